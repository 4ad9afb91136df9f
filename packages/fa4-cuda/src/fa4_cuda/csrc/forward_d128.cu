#include "launch.cuh"

template fa4::ForwardLauncher fa4::forward_launcher<128>(int tile, Element element);
