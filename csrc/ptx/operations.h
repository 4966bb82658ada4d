// What instructions do, by name.
#pragma once

#include <string>
#include <unordered_map>

#include "ptx/machine.h"

namespace snv2::ptx {

// Most are named as their opcode, such as "add.s32"; those whose opcode does not tell which types
// they take, as decode.cpp calls them. Null if there is none.
Operation operation_named(const std::string& name);

using Operations = std::unordered_map<std::string, Operation>;
void add_arithmetic(Operations& all);   // of floats
void add_bits(Operations& all);         // integers and predicates
void add_conversions(Operations& all);  // and moves
void add_lanes(Operations& all);
void add_matrices(Operations& all);
void add_memory(Operations& all);
void add_transactions(Operations& all);  // barriers that count

// An operation F on each lane ------------------------------------------------------------------

template <class D, class A, class F>
void unary(Warp& w, const Instruction& i, uint32_t mask) {
  const A* const a = lanes_at<A>(w, i.a);
  alignas(Block) D d[kLanes];
  for (uint32_t l = 0; l < kLanes; ++l) d[l] = F::of(a[l]);
  put(w, i.d, d, mask);
}

template <class D, class A, class B, class F>
void binary(Warp& w, const Instruction& i, uint32_t mask) {
  const A* const a = lanes_at<A>(w, i.a);
  const B* const b = lanes_at<B>(w, i.b);
  alignas(Block) D d[kLanes];
  for (uint32_t l = 0; l < kLanes; ++l) d[l] = F::of(a[l], b[l]);
  put(w, i.d, d, mask);
}

template <class D, class A, class C, class F>
void ternary(Warp& w, const Instruction& i, uint32_t mask) {
  const A* const a = lanes_at<A>(w, i.a);
  const A* const b = lanes_at<A>(w, i.b);
  const C* const c = lanes_at<C>(w, i.c);
  alignas(Block) D d[kLanes];
  for (uint32_t l = 0; l < kLanes; ++l) d[l] = F::of(a[l], b[l], c[l]);
  put(w, i.d, d, mask);
}

// d is a predicate.
template <class T, class F>
void compare(Warp& w, const Instruction& i, uint32_t mask) {
  const T* const a = lanes_at<T>(w, i.a);
  const T* const b = lanes_at<T>(w, i.b);
  uint32_t bits = 0;
  for (uint32_t l = 0; l < kLanes; ++l) bits |= uint32_t{F::of(a[l], b[l])} << l;
  put_predicate(w, i.d, bits, mask);
}

}  // namespace snv2::ptx
