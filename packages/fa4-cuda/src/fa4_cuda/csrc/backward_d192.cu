#include "backward_launch.cuh"

template fa4::BackwardKernels fa4::backward_kernels<192>(int tile, Element element);
