#include "launch.cuh"

template fa4::ForwardLauncher fa4::forward_launcher<64>(int tile, Element element);
