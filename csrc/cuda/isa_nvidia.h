// Bodies of isa.h for the GPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

namespace snv2::SNV2_GPU {

#define SNV2_DEVICE __device__ __forceinline__

template <class T>
struct Global {
  T* address;
  SNV2_DEVICE Global operator+(int64_t i) const { return {address + i}; }
};

// Bytes from the beginning of the CTA's dynamic shared memory, which is aligned to 16: half of a
// pointer's. (Of an address that is a number by itself nvcc takes minutes for some kernels.)
template <class T>
struct Shared {
  int at;
  SNV2_DEVICE Shared operator+(int i) const { return {at + i * static_cast<int>(sizeof(T))}; }
  template <class U>
  SNV2_DEVICE Shared<U> as() const {
    return {at};
  }
  SNV2_DEVICE T* pointer() const {
    extern __shared__ uint4 snv2_shared_memory[];
    return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(snv2_shared_memory) + at);
  }
  // That instructions take.
  SNV2_DEVICE uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer()));
  }
};

// Returns the earlier of two places.
template <class T>
SNV2_DEVICE Shared<T> earlier(Shared<T> a, Shared<T> b) {
  return {a.at < b.at ? a.at : b.at};
}

template <class T>
struct Address {
  uint32_t address = 0;
  Address() = default;
  SNV2_DEVICE explicit Address(Shared<T> row) : address(row.address()) {}
  template <class U>
  SNV2_DEVICE Address<U> as() const {
    Address<U> same;
    same.address = address;
    return same;
  }
  SNV2_DEVICE Address operator+(int i) const {
    Address there = *this;
    there.address += static_cast<uint32_t>(i) * sizeof(T);
    return there;
  }
};
template <class T>
SNV2_DEVICE bool is_before(Address<T> a, Address<T> b) {
  return a.address < b.address;
}
template <class T>
SNV2_DEVICE Address<T> earlier(Address<T> a, Address<T> b) {
  a.address = a.address < b.address ? a.address : b.address;
  return a;
}

// Shared memory of another CTA of the cluster.
template <class T>
struct Remote {
  T* address;
  SNV2_DEVICE Remote operator+(int i) const { return {address + i}; }
};

SNV2_DEVICE Shared<unsigned char> shared_memory() { return {0}; }

}  // namespace snv2::SNV2_GPU

#include "cuda/isa_nvidia_memory.h"

namespace snv2::SNV2_GPU {

// Other threads ---------------------------------------------------------------------------

SNV2_DEVICE void sync_threads() { __syncthreads(); }
SNV2_DEVICE void sync_warp(uint32_t mask = kFullMask) { __syncwarp(mask); }

template <class T>
SNV2_DEVICE T shuffle(T value, int lane, uint32_t mask = kFullMask) {
  return __shfl_sync(mask, value, lane);
}
template <class T>
SNV2_DEVICE T shuffle_xor(T value, int lanes, uint32_t mask = kFullMask) {
  return __shfl_xor_sync(mask, value, lanes);
}
template <class T>
SNV2_DEVICE T shuffle_up(T value, int lanes, uint32_t mask = kFullMask) {
  return __shfl_up_sync(mask, value, lanes);
}
template <class T>
SNV2_DEVICE T shuffle_down(T value, int lanes, uint32_t mask = kFullMask) {
  return __shfl_down_sync(mask, value, lanes);
}

// A value that is the same in all lanes, known to be so by the compiler.
SNV2_DEVICE int warp_uniform(int value) { return __shfl_sync(kFullMask, value, 0); }

// Works a value out here and keeps it in a register: the compiler would do so for each use.
SNV2_DEVICE float in_register(float value) {
  asm volatile("" : "+f"(value));
  return value;
}
SNV2_DEVICE int in_register(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// All threads of a cooperative launch.
SNV2_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

// Launches that overlap (Launch::overlaps), on sm_90 and newer; elsewhere there are none. Waits
// until all that came before this kernel in its stream is done, and can be seen.
SNV2_DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel begin, once all CTAs have said so or ended.
SNV2_DEVICE void grid_dependents_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Clusters: sm_90 and newer; elsewhere they end the kernel.
SNV2_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.aligned;\n"
      "barrier.cluster.wait.aligned;" ::
          : "memory");
#else
  __trap();
#endif
}

// The same, where all that others may do afterwards is overwrite what was read: nothing written
// before need be visible beyond the CTA, so no thread waits for its stores to reach L2.
SNV2_DEVICE void sync_cluster_reads() {
#if __CUDA_ARCH__ >= 900
  __syncthreads();
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;" ::
          : "memory");
#else
  __trap();
#endif
}

SNV2_DEVICE int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#else
  __trap();
#endif
  return static_cast<int>(rank);
}

// The same place in the shared memory of another CTA of the cluster.
template <class T>
SNV2_DEVICE Remote<T> remote(Shared<T> p, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p.pointer()), "r"(rank));
  return {reinterpret_cast<T*>(address)};
#else
  __trap();
  return {p.pointer()};
#endif
}

// Tensor cores ----------------------------------------------------------------------------
//
// Fragments as PTX describes them: a warp holds a 16 x 16 A (fp16, bf16) or 16 x 8 (tf32), a
// 16 x 8 B (8 x 8), and a 16 x 8 float D.

// 8 x 8 matrices of 16-bit elements: lane 8 m + r names row r of matrix m, kOffset elements before
// it.
template <int Matrices, bool Transposed = false, int kOffset = 0, class T>
SNV2_DEVICE void ldmatrix(uint32_t (&d)[Matrices], Address<T> row) {
  static_assert(Matrices == 1 || Matrices == 2 || Matrices == 4);
  const uint32_t address = row.address;
  constexpr int kBytes = kOffset * static_cast<int>(sizeof(T));
#define SNV2_LDMATRIX(TRANS)                                                                      \
  if constexpr (Matrices == 1) {                                                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" TRANS ".shared.b16 {%0}, [%1 + %2];"             \
                 : "=r"(d[0])                                                                     \
                 : "r"(address), "n"(kBytes)                                                      \
                 : "memory");                                                                     \
  } else if constexpr (Matrices == 2) {                                                           \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" TRANS ".shared.b16 {%0, %1}, [%2 + %3];"         \
                 : "=r"(d[0]), "=r"(d[1])                                                         \
                 : "r"(address), "n"(kBytes)                                                      \
                 : "memory");                                                                     \
  } else {                                                                                        \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANS ".shared.b16 {%0, %1, %2, %3}, [%4 + %5];" \
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                 \
                 : "r"(address), "n"(kBytes)                                                      \
                 : "memory");                                                                     \
  }
  if constexpr (Transposed) {
    SNV2_LDMATRIX(".trans")
  } else {
    SNV2_LDMATRIX("")
  }
#undef SNV2_LDMATRIX
}
template <int Matrices, bool Transposed = false, class T>
SNV2_DEVICE void ldmatrix(uint32_t (&d)[Matrices], Shared<T> row) {
  ldmatrix<Matrices, Transposed>(d, Address<T>(row));
}

#if __CUDA_ARCH__ >= 800
#define SNV2_MMA(NAME, SHAPE_TYPES)                                                             \
  SNV2_DEVICE void NAME(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],          \
                        const float (&c)[4]) {                                                  \
    asm volatile("mma.sync.aligned." SHAPE_TYPES                                                \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"         \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), \
                   "f"(c[1]), "f"(c[2]), "f"(c[3]));                                            \
  }
#else
#define SNV2_MMA(NAME, SHAPE_TYPES)                                                 \
  SNV2_DEVICE void NAME(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], \
                        const float (&)[4]) {                                       \
    __trap();                                                                       \
  }
#endif
// d = c + a b; d may be c.
SNV2_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
SNV2_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
SNV2_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef SNV2_MMA

}  // namespace snv2::SNV2_GPU

#include "cuda/isa_nvidia_async.h"
#include "cuda/isa_nvidia_numbers.h"
