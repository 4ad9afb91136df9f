#include "backward_launch.cuh"

template fa4::BackwardKernels fa4::backward_kernels<256>(int tile, Element element);
