// Bodies of isa.h for the GPU: global and shared memory. isa_nvidia.h includes it.
#pragma once

#include "cuda/isa_nvidia.h"

namespace snv2::SNV2_GPU {

template <class T>
SNV2_DEVICE T load(Global<const T> p) {
  return *p.address;
}
template <class T>
SNV2_DEVICE void store(Global<T> p, T value) {
  *p.address = value;
}
template <class T>
SNV2_DEVICE T load(Shared<T> p) {
  return *p.pointer();
}
template <class T>
SNV2_DEVICE void store(Shared<T> p, T value) {
  *p.pointer() = value;
}
template <class T>
SNV2_DEVICE T load(Remote<T> p) {
  return *p.address;
}
template <class T>
SNV2_DEVICE void store(Remote<T> p, T value) {
  *p.address = value;
}

namespace detail {
template <int Bytes>
struct Bits;
template <>
struct Bits<2> {
  using type = uint16_t;
};
template <>
struct Bits<4> {
  using type = uint32_t;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<16> {
  using type = uint4;
};

template <class V, class T>
SNV2_DEVICE V load_bits(const T* p) {
  const auto bits = *reinterpret_cast<const typename Bits<sizeof(V)>::type*>(p);
  V value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class V, class T>
SNV2_DEVICE void store_bits(T* p, const V& value) {
  typename Bits<sizeof(V)>::type bits;
  memcpy(&bits, &value, sizeof value);
  *reinterpret_cast<typename Bits<sizeof(V)>::type*>(p) = bits;
}
}  // namespace detail

template <int N, class T>
SNV2_DEVICE Vector<T, N> load_vector(Global<const T> p) {
  return detail::load_bits<Vector<T, N>>(p.address);
}
// kOffset elements after p. One instruction, which the compiler would cut into words.
template <int N, int kOffset = 0, class T>
SNV2_DEVICE void store_vector(Global<T> p, const Vector<T, N>& value) {
  constexpr int kBytes = kOffset * static_cast<int>(sizeof(T));
  typename detail::Bits<sizeof(value)>::type bits;
  memcpy(&bits, &value, sizeof bits);
  if constexpr (sizeof bits == 16) {
    asm volatile("st.global.v4.u32 [%0 + %5], {%1, %2, %3, %4};" ::"l"(p.address), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w), "n"(kBytes)
                 : "memory");
  } else if constexpr (sizeof bits == 8) {
    asm volatile("st.global.v2.u32 [%0 + %3], {%1, %2};" ::"l"(p.address), "r"(bits.x), "r"(bits.y),
                 "n"(kBytes)
                 : "memory");
  } else {
    *reinterpret_cast<decltype(bits)*>(p.address + kOffset) = bits;
  }
}
template <int N, class T>
SNV2_DEVICE Vector<T, N> load_vector(Shared<T> p) {
  return detail::load_bits<Vector<T, N>>(p.pointer());
}
template <int N, class T>
SNV2_DEVICE void store_vector(Shared<T> p, const Vector<T, N>& value) {
  detail::store_bits(p.pointer(), value);
}
// kOffset elements after p, which are a part of the instruction.
template <int N, int kOffset = 0, class T>
SNV2_DEVICE Vector<T, N> load_vector(Address<T> p) {
  constexpr int kBytes = kOffset * static_cast<int>(sizeof(T));
  Vector<T, N> value;
  if constexpr (sizeof value == 16) {
    uint4 bits;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(p.address), "n"(kBytes)
                 : "memory");
    memcpy(&value, &bits, sizeof value);
  } else if constexpr (sizeof value == 8) {
    uint2 bits;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];"
                 : "=r"(bits.x), "=r"(bits.y)
                 : "r"(p.address), "n"(kBytes)
                 : "memory");
    memcpy(&value, &bits, sizeof value);
  } else if constexpr (sizeof value == 4) {
    uint32_t bits;
    asm volatile("ld.shared.u32 %0, [%1 + %2];"
                 : "=r"(bits)
                 : "r"(p.address), "n"(kBytes)
                 : "memory");
    memcpy(&value, &bits, sizeof value);
  } else {
    uint16_t bits;
    asm volatile("ld.shared.u16 %0, [%1 + %2];"
                 : "=h"(bits)
                 : "r"(p.address), "n"(kBytes)
                 : "memory");
    memcpy(&value, &bits, sizeof value);
  }
  return value;
}
template <int N, int kOffset = 0, class T>
SNV2_DEVICE void store_vector(Address<T> p, const Vector<T, N>& value) {
  constexpr int kBytes = kOffset * static_cast<int>(sizeof(T));
  typename detail::Bits<sizeof(value)>::type bits;
  memcpy(&bits, &value, sizeof bits);
  if constexpr (sizeof bits == 16) {
    asm volatile("st.shared.v4.u32 [%0 + %5], {%1, %2, %3, %4};" ::"r"(p.address), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w), "n"(kBytes)
                 : "memory");
  } else if constexpr (sizeof bits == 8) {
    asm volatile("st.shared.v2.u32 [%0 + %3], {%1, %2};" ::"r"(p.address), "r"(bits.x), "r"(bits.y),
                 "n"(kBytes)
                 : "memory");
  } else if constexpr (sizeof bits == 4) {
    asm volatile("st.shared.u32 [%0 + %2], %1;" ::"r"(p.address), "r"(bits), "n"(kBytes)
                 : "memory");
  } else {
    asm volatile("st.shared.u16 [%0 + %2], %1;" ::"r"(p.address), "h"(bits), "n"(kBytes)
                 : "memory");
  }
}
// Loads floats into registers of floats, to which PTX would move them from others.
template <int N, int kOffset = 0>
SNV2_DEVICE Vector<float, N> load_vector(Address<float> p) {
  Vector<float, N> v;
  if constexpr (N == 4) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=f"(v.values[0]), "=f"(v.values[1]), "=f"(v.values[2]), "=f"(v.values[3])
                 : "r"(p.address), "n"(4 * kOffset)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];"
                 : "=f"(v.values[0]), "=f"(v.values[1])
                 : "r"(p.address), "n"(4 * kOffset)
                 : "memory");
  } else {
    asm volatile("ld.shared.f32 %0, [%1 + %2];"
                 : "=f"(v.values[0])
                 : "r"(p.address), "n"(4 * kOffset)
                 : "memory");
  }
  return v;
}
template <int N, int kOffset = 0>
SNV2_DEVICE void store_vector(Address<float> p, const Vector<float, N>& v) {
  if constexpr (N == 4) {
    asm volatile("st.shared.v4.f32 [%0 + %5], {%1, %2, %3, %4};" ::"r"(p.address), "f"(v.values[0]),
                 "f"(v.values[1]), "f"(v.values[2]), "f"(v.values[3]), "n"(4 * kOffset)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("st.shared.v2.f32 [%0 + %3], {%1, %2};" ::"r"(p.address), "f"(v.values[0]),
                 "f"(v.values[1]), "n"(4 * kOffset)
                 : "memory");
  } else {
    asm volatile("st.shared.f32 [%0 + %2], %1;" ::"r"(p.address), "f"(v.values[0]), "n"(4 * kOffset)
                 : "memory");
  }
}
template <int N, class T>
SNV2_DEVICE void store_vector(Remote<T> p, const Vector<T, N>& value) {
  detail::store_bits(p.address, value);
}

// A store under a predicate: lanes that do not want it stay with the others. Of a branch the
// compiler may make two loops.
template <int N, class T>
SNV2_DEVICE void store_vector_if(bool wanted, Address<T> p, const Vector<T, N>& value) {
  typename detail::Bits<sizeof value>::type bits;
  memcpy(&bits, &value, sizeof bits);
  if constexpr (sizeof bits == 2) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.shared.u16 [%1], %2;}" ::"r"(
                     static_cast<int>(wanted)),
                 "r"(p.address), "h"(bits)
                 : "memory");
  } else if constexpr (sizeof bits == 16) {
    asm volatile(
        "{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.shared.v4.u32 [%1], {%2, %3, %4, %5};}" ::"r"(
            static_cast<int>(wanted)),
        "r"(p.address), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
        : "memory");
  } else {
    static_assert(sizeof bits == 4, "half a word, one or four");
    asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.shared.u32 [%1], %2;}" ::"r"(
                     static_cast<int>(wanted)),
                 "r"(p.address), "r"(bits)
                 : "memory");
  }
}

template <class T>
SNV2_DEVICE void store_if(bool wanted, Shared<T> p, T value) {
  store_vector_if(wanted, Address<T>(p), Vector<T, 1>{{value}});
}

// Stores zero, kOffset elements after p, where `value` is at most zero; not where it is NaN.
template <int kOffset, class T>
SNV2_DEVICE void clear_unless_above_zero(float value, Address<T> p) {
  constexpr int kBytes = kOffset * static_cast<int>(sizeof(T));
  if constexpr (sizeof(T) == 2) {
    asm volatile(
        "{.reg .pred p; setp.le.f32 p, %0, 0f00000000; @p st.shared.u16 [%1 + %2], %3;}" ::"f"(
            value),
        "r"(p.address), "n"(kBytes), "h"(static_cast<uint16_t>(0))
        : "memory");
  } else {
    static_assert(sizeof(T) == 4);
    asm volatile(
        "{.reg .pred p; setp.le.f32 p, %0, 0f00000000; @p st.shared.u32 [%1 + %2], %3;}" ::"f"(
            value),
        "r"(p.address), "n"(kBytes), "r"(0)
        : "memory");
  }
}

// Words of two halves: of a low and a high one, and of the low or the high ones of two words.
SNV2_DEVICE uint32_t word_of(uint16_t low, uint16_t high) {
  uint32_t word;
  asm("mov.b32 %0, {%1, %2};" : "=r"(word) : "h"(low), "h"(high));
  return word;
}
SNV2_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
SNV2_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// Where p lies modulo `bytes`, a power of two.
template <class T>
SNV2_DEVICE int misalignment(Global<T> p, int bytes) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p.address) & (bytes - 1));
}

// Copies that run beside the thread: visible to it after wait, to others after a barrier. Below
// sm_80 they are ordinary copies.
// kOffset elements after both places.
template <int N, int kOffset = 0, class T>
SNV2_DEVICE void cp_async(Address<T> to, Global<const T> from) {
  constexpr int kBytes = N * sizeof(T);
  [[maybe_unused]] constexpr int kAt = kOffset * static_cast<int>(sizeof(T));
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;" ::"r"(to.address),
                 "l"(from.address), "n"(kAt)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0 + %3], [%1 + %3], %2;" ::"r"(to.address),
                 "l"(from.address), "n"(kBytes), "n"(kAt)
                 : "memory");
  }
#else
  store_vector<N, kOffset>(to, load_vector<N>(from + kOffset));
#endif
}
template <int N, int kOffset = 0, class T>
SNV2_DEVICE void cp_async(Shared<T> to, Global<const T> from) {
  cp_async<N, kOffset>(Address<T>(to), from);
}

SNV2_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's latest groups are still under way.
template <int Pending>
SNV2_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace snv2::SNV2_GPU
