// What a function of one element is marked with, so that the CPU and CUDA share its text.
#pragma once

#ifdef __CUDACC__
#define DBK_HD __host__ __device__ __forceinline__
#else
#define DBK_HD inline
#endif
