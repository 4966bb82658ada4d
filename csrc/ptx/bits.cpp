// Integer arithmetic, bits and predicates. Signed integers wrap: this file is compiled with
// -fwrapv.
#include <algorithm>
#include <type_traits>

#include "ptx/operations.h"

namespace snv2::ptx {
namespace {

template <class T>
constexpr uint32_t kBits = 8 * sizeof(T);

template <class T>
struct Wider;
template <>
struct Wider<uint16_t> {
  using Type = uint32_t;
};
template <>
struct Wider<int16_t> {
  using Type = int32_t;
};
template <>
struct Wider<uint32_t> {
  using Type = uint64_t;
};
template <>
struct Wider<int32_t> {
  using Type = int64_t;
};
template <>
struct Wider<uint64_t> {
  using Type = unsigned __int128;
};
template <>
struct Wider<int64_t> {
  using Type = __int128;
};
template <class T>
using Wide = typename Wider<T>::Type;

template <class T>
struct Integer {
  struct Add {
    static T of(T a, T b) { return static_cast<T>(a + b); }
  };
  struct Subtract {
    static T of(T a, T b) { return static_cast<T>(a - b); }
  };
  struct Negate {
    static T of(T a) { return static_cast<T>(0 - a); }
  };
  struct MultiplyWide {
    static Wide<T> of(T a, T b) { return static_cast<Wide<T>>(static_cast<Wide<T>>(a) * b); }
  };
  struct MultiplyLow {
    static T of(T a, T b) { return static_cast<T>(a * b); }
  };
  struct MultiplyHigh {
    static T of(T a, T b) { return static_cast<T>(MultiplyWide::of(a, b) >> kBits<T>); }
  };
  struct MultiplyLowAdd {
    static T of(T a, T b, T c) { return static_cast<T>(MultiplyLow::of(a, b) + c); }
  };
  struct MultiplyWideAdd {
    static Wide<T> of(T a, T b, Wide<T> c) {
      return static_cast<Wide<T>>(MultiplyWide::of(a, b) + c);
    }
  };
  // Division by zero has no documented result; -1 in a divisor is not left to the host, which
  // traps.
  struct Divide {
    static T of(T a, T b) {
      if (b == 0) return static_cast<T>(-1);
      return std::is_signed_v<T> && b == static_cast<T>(-1) ? Negate::of(a) : static_cast<T>(a / b);
    }
  };
  struct Remainder {
    static T of(T a, T b) {
      if (b == 0) return a;
      return std::is_signed_v<T> && b == static_cast<T>(-1) ? T{0} : static_cast<T>(a % b);
    }
  };
  struct Minimum {
    static T of(T a, T b) { return std::min(a, b); }
  };
  struct Maximum {
    static T of(T a, T b) { return std::max(a, b); }
  };
  // Shifts by more than there are bits make 0, or the sign.
  struct ShiftLeft {
    static T of(T a, uint32_t n) { return n >= kBits<T> ? T{0} : static_cast<T>(a << n); }
  };
  struct ShiftRight {
    static T of(T a, uint32_t n) {
      if (n < kBits<T>) return static_cast<T>(a >> n);
      return a < T{0} ? static_cast<T>(-1) : T{0};
    }
  };

  struct Equal {
    static bool of(T a, T b) { return a == b; }
  };
  struct NotEqual {
    static bool of(T a, T b) { return a != b; }
  };
  struct Less {
    static bool of(T a, T b) { return a < b; }
  };
  struct LessOrEqual {
    static bool of(T a, T b) { return a <= b; }
  };
  struct Greater {
    static bool of(T a, T b) { return a > b; }
  };
  struct GreaterOrEqual {
    static bool of(T a, T b) { return a >= b; }
  };

  static void add(Operations& all, const std::string& type) {
    all["add." + type] = binary<T, T, T, Add>;
    all["sub." + type] = binary<T, T, T, Subtract>;
    all["neg." + type] = unary<T, T, Negate>;
    all["mul.lo." + type] = binary<T, T, T, MultiplyLow>;
    all["mul.hi." + type] = binary<T, T, T, MultiplyHigh>;
    all["mad.lo." + type] = ternary<T, T, T, MultiplyLowAdd>;
    all["div." + type] = binary<T, T, T, Divide>;
    all["rem." + type] = binary<T, T, T, Remainder>;
    all["min." + type] = binary<T, T, T, Minimum>;
    all["max." + type] = binary<T, T, T, Maximum>;
    all["shr." + type] = binary<T, T, uint32_t, ShiftRight>;
    if constexpr (sizeof(T) < 8) {
      all["mul.wide." + type] = binary<Wide<T>, T, T, MultiplyWide>;
      all["mad.wide." + type] = ternary<Wide<T>, T, Wide<T>, MultiplyWideAdd>;
    }
    all["setp.eq." + type] = compare<T, Equal>;
    all["setp.ne." + type] = compare<T, NotEqual>;
    all["setp.lt." + type] = compare<T, Less>;
    all["setp.le." + type] = compare<T, LessOrEqual>;
    all["setp.gt." + type] = compare<T, Greater>;
    all["setp.ge." + type] = compare<T, GreaterOrEqual>;
  }
};

struct And {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <class T>
  static T of(T a) {
    return static_cast<T>(~a);
  }
};

// d = b with `length` bits of a at `position`: c, and operand 0 of the list.
template <class T>
void insert_bits(Warp& w, const Instruction& i, uint32_t mask) {
  const T* const a = lanes_at<T>(w, i.a);
  const T* const b = lanes_at<T>(w, i.b);
  const uint32_t* const positions = lanes_at<uint32_t>(w, i.c);
  const uint32_t* const lengths = lanes_at<uint32_t>(w, operand_of(w, i, 0));
  alignas(Block) T d[kLanes];
  for (uint32_t l = 0; l < kLanes; ++l) {
    const uint32_t position = positions[l] & 0xff, length = lengths[l] & 0xff;
    const T all = static_cast<T>(~T{0});
    const T low = length >= kBits<T> ? all : static_cast<T>(~(all << length));
    const T field = position >= kBits<T> ? T{0} : static_cast<T>(low << position);
    const T moved = position >= kBits<T> ? T{0} : static_cast<T>(a[l] << position);
    d[l] = static_cast<T>((b[l] & ~field) | (moved & field));
  }
  put(w, i.d, d, mask);
}

// Each byte of d is one of the eight of a and b, or its sign, as four bits of c say.
struct PickBytes {
  static uint32_t of(uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t bytes = a | uint64_t{b} << 32;
    uint32_t d = 0;
    for (uint32_t k = 0; k < 4; ++k) {
      const uint32_t selector = c >> 4 * k & 0xf;
      uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (selector & 7)) & 0xff;
      if ((selector & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
      d |= byte << 8 * k;
    }
    return d;
  }
};
template <bool kLeft>
struct FunnelShift {
  static uint32_t of(uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t both = a | uint64_t{b} << 32;
    return static_cast<uint32_t>(kLeft ? both << (c & 31) >> 32 : both >> (c & 31));
  }
};

template <class T>
void select(Warp& w, const Instruction& i, uint32_t mask) {
  const T* const a = lanes_at<T>(w, i.a);
  const T* const b = lanes_at<T>(w, i.b);
  const uint32_t p = predicate_at(w, i.c);
  alignas(Block) T d[kLanes];
  for (uint32_t l = 0; l < kLanes; ++l) d[l] = (p >> l & 1) != 0 ? a[l] : b[l];
  put(w, i.d, d, mask);
}

template <class F>
void combine_predicates(Warp& w, const Instruction& i, uint32_t mask) {
  put_predicate(w, i.d, F::of(predicate_at(w, i.a), predicate_at(w, i.b)), mask);
}
void move_predicate(Warp& w, const Instruction& i, uint32_t mask) {
  put_predicate(w, i.d, predicate_at(w, i.a), mask);
}
void invert_predicate(Warp& w, const Instruction& i, uint32_t mask) {
  put_predicate(w, i.d, ~predicate_at(w, i.a), mask);
}

template <class T, class Signed>
void add_width(Operations& all, const std::string& bits) {
  Integer<T>::add(all, "u" + bits);
  Integer<Signed>::add(all, "s" + bits);
  all["and.b" + bits] = binary<T, T, T, And>;
  all["or.b" + bits] = binary<T, T, T, Or>;
  all["xor.b" + bits] = binary<T, T, T, Xor>;
  all["not.b" + bits] = unary<T, T, Not>;
  all["shl.b" + bits] = binary<T, T, uint32_t, typename Integer<T>::ShiftLeft>;
  all["setp.eq.b" + bits] = compare<T, typename Integer<T>::Equal>;
  all["setp.ne.b" + bits] = compare<T, typename Integer<T>::NotEqual>;
  for (const char* const kind : {"b", "u", "s"}) all["selp." + (kind + bits)] = select<T>;
}

}  // namespace

void add_bits(Operations& all) {
  add_width<uint16_t, int16_t>(all, "16");
  add_width<uint32_t, int32_t>(all, "32");
  add_width<uint64_t, int64_t>(all, "64");
  all["selp.f32"] = select<uint32_t>;
  all["bfi.b32"] = insert_bits<uint32_t>;
  all["bfi.b64"] = insert_bits<uint64_t>;
  all["prmt.b32"] = ternary<uint32_t, uint32_t, uint32_t, PickBytes>;
  all["shf.l.wrap.b32"] = ternary<uint32_t, uint32_t, uint32_t, FunnelShift<true>>;
  all["shf.r.wrap.b32"] = ternary<uint32_t, uint32_t, uint32_t, FunnelShift<false>>;
  all["and.pred"] = combine_predicates<And>;
  all["or.pred"] = combine_predicates<Or>;
  all["xor.pred"] = combine_predicates<Xor>;
  all["not.pred"] = invert_predicate;
  all["mov.pred"] = move_predicate;
}

}  // namespace snv2::ptx
