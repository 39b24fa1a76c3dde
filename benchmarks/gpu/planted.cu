// Two planted faults, so that a silent compute-sanitizer is not taken for sound kernels:
// `planted memory` writes past the end of an allocation, `planted race` leaves out a barrier.
#include <cstdio>
#include <cstring>

__global__ void past_the_end(int* out, int n) { out[n + threadIdx.x] = 1; }

__global__ void without_barrier(int* out) {
  __shared__ int shared[256];
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[255 - threadIdx.x];
}

int main(int argc, char** argv) {
  int* out = nullptr;
  if (argc != 2 || cudaMalloc(&out, 256 * sizeof(int)) != cudaSuccess) return 2;
  if (std::strcmp(argv[1], "race") == 0) {
    without_barrier<<<1, 256>>>(out);
  } else {
    past_the_end<<<1, 32>>>(out, 256);
  }
  std::printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
