#include "backward_launch.cuh"

template fa4::BackwardLauncher fa4::backward_launcher<64>(int tile, Element element);
