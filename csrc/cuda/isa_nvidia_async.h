// Bodies of isa.h for the GPU: copies and stores that a barrier in shared memory waits for, of
// sm_90 and newer; elsewhere they end the kernel. isa_nvidia.h includes it.
#pragma once

#include "cuda/isa_nvidia.h"

namespace snv2::SNV2_GPU {

namespace detail {
template <class T>
SNV2_DEVICE uint32_t address_of(Shared<T> p) {
  return p.address();
}
template <class T>
SNV2_DEVICE uint32_t address_of(Address<T> p) {
  return p.address;
}
}  // namespace detail

// Place and Barrier are Shared or Address in all of these.

// A barrier of so many arrivals in each phase; the first phase has parity 0. One thread does this,
// and fence_barrier_init() after it.
template <template <class> class Barrier>
SNV2_DEVICE void barrier_init(Barrier<uint64_t> barrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::address_of(barrier)),
               "r"(arrivals)
               : "memory");
#else
  __trap();
#endif
}

// Lets copies and other CTAs see barriers that this thread has made, once a barrier of the CTA or
// the cluster lies between as well.
SNV2_DEVICE void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
}

// Arrives, and has the phase wait for so many bytes more.
template <template <class> class Barrier>
SNV2_DEVICE void barrier_expect(Barrier<uint64_t> barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(detail::address_of(barrier)),
      "r"(bytes)
      : "memory");
#else
  __trap();
#endif
}

#if __CUDA_ARCH__ >= 900
#define SNV2_WAIT(ACQUIRE)                                         \
  int done;                                                        \
  do {                                                             \
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity" ACQUIRE \
                 ".shared::cta.b64 p, [%1], %2; "                  \
                 "selp.s32 %0, 1, 0, p;}"                          \
                 : "=r"(done)                                      \
                 : "r"(detail::address_of(barrier)), "r"(parity)   \
                 : "memory");                                      \
  } while (done == 0)
#else
#define SNV2_WAIT(ACQUIRE) __trap()
#endif

// Waits until the phase of that parity is complete: all arrivals and all bytes are there. What
// other CTAs stored is only for those who wait for it by barrier_wait_cluster().
template <template <class> class Barrier>
SNV2_DEVICE void barrier_wait(Barrier<uint64_t> barrier, int parity) {
  SNV2_WAIT("");
}
template <template <class> class Barrier>
SNV2_DEVICE void barrier_wait_cluster(Barrier<uint64_t> barrier, int parity) {
  SNV2_WAIT(".acquire.cluster");
}
#undef SNV2_WAIT

// Orders what this thread has stored before bulk copies to the same places, which others start
// after a barrier of the CTA.
SNV2_DEVICE void fence_bulk_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  __trap();
#endif
}

// Copies as many bytes, a multiple of 16, between places that are aligned to 16.
template <class T, template <class> class Place, template <class> class Barrier>
SNV2_DEVICE void copy_bulk(Place<T> to, Global<const T> from, int bytes,
                           Barrier<uint64_t> barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(detail::address_of(to)),
      "l"(from.address), "r"(bytes), "r"(detail::address_of(barrier))
      : "memory");
#else
  __trap();
#endif
}

// Stores to CTA `rank` of the cluster, where `to` and `barrier` lie as they do in this one.
template <int N, class T, template <class> class Place, template <class> class Barrier>
SNV2_DEVICE void store_async(Place<T> to, Barrier<uint64_t> barrier, int rank,
                             const Vector<T, N>& value) {
  static_assert(sizeof value == 4 || sizeof value == 8 || sizeof value == 16,
                "st.async stores 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 900
  uint32_t there, barrier_there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(detail::address_of(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(barrier_there)
      : "r"(detail::address_of(barrier)), "r"(rank));
  typename detail::Bits<sizeof(value)>::type bits;
  memcpy(&bits, &value, sizeof bits);
#define SNV2_ST_ASYNC "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"
  if constexpr (sizeof bits == 16) {
    asm volatile(SNV2_ST_ASYNC ".v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(there),
                 "r"(barrier_there), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
  } else if constexpr (sizeof bits == 8) {
    asm volatile(SNV2_ST_ASYNC ".v2.b32 [%0], {%2, %3}, [%1];" ::"r"(there), "r"(barrier_there),
                 "r"(bits.x), "r"(bits.y)
                 : "memory");
  } else {
    asm volatile(SNV2_ST_ASYNC ".b32 [%0], %2, [%1];" ::"r"(there), "r"(barrier_there), "r"(bits)
                 : "memory");
  }
#undef SNV2_ST_ASYNC
#else
  __trap();
#endif
}

}  // namespace snv2::SNV2_GPU
