// Cases of arithmetic and conversions (conformance.cu).
#pragma once

#include "cuda/conformance_memory.h"

namespace snv2::SNV2_GPU {
namespace {

template <class T>
__global__ void __launch_bounds__(128) to_float_all(Params p) {
  const T value = load(as<const T>(p.in) + thread());
  store(p.out + thread(), bits_of(to_float(value)));
}

// One result in the low half of each word.
template <class T>
__global__ void __launch_bounds__(128) from_float_all(Params p) {
  T value;
  from_float(float_of(load(p.in + thread())), value);
  store(p.out + thread(), static_cast<uint32_t>(value.bits));
}

__global__ void __launch_bounds__(128) to_tf32_all(Params p) {
  store(p.out + thread(), to_tf32(float_of(load(p.in + thread()))));
}

__global__ void __launch_bounds__(128) relu_all(Params p) {
  store(p.out + thread(), bits_of(relu(float_of(load(p.in + thread())))));
}

__global__ void __launch_bounds__(128) max_nan_float(Params p) {
  const Global<const uint32_t> in = p.in + 2 * thread();
  store(p.out + thread(), bits_of(max_nan(float_of(load(in)), float_of(load(in + 1)))));
}

// One result in the low half of each word.
template <class T>
__global__ void __launch_bounds__(64) max_nan_pairs(Params p) {
  const Global<const T> in = as<const T>(p.in) + 4 * thread();
  const Vector<T, 2> larger = max_nan(load_vector<2>(in), load_vector<2>(in + 2));
  for (int j = 0; j < 2; ++j) {
    store(p.out + (2 * thread() + j), static_cast<uint32_t>(larger.values[j].bits));
  }
}

// Unpacks both numbers of a word, then each alone.
template <class T>
__global__ void __launch_bounds__(64) to_floats_all(Params p) {
  const uint32_t word = load(p.in + thread());
  float values[2];
  to_floats<T>(word, values);
  const Global<uint32_t> out = p.out + 4 * thread();
  store(out, bits_of(values[0]));
  store(out + 1, bits_of(values[1]));
  store(out + 2, bits_of(low_to_float<T>(word)));
  store(out + 3, bits_of(high_to_float<T>(word)));
}

// One result in the low half of each word.
template <class T>
__global__ void __launch_bounds__(64) rounded_pairs(Params p) {
  const Global<const uint32_t> in = p.in + 2 * thread();
  const Vector<T, 2> pair = rounded_pair<T>(float_of(load(in)), float_of(load(in + 1)));
  for (int j = 0; j < 2; ++j) {
    store(p.out + (2 * thread() + j), static_cast<uint32_t>(pair.values[j].bits));
  }
}

__global__ void __launch_bounds__(128) multiply_add_all(Params p) {
  const Global<const uint32_t> in = p.in + 3 * thread();
  store(p.out + thread(),
        bits_of(multiply_add(float_of(load(in)), float_of(load(in + 1)), float_of(load(in + 2)))));
}

__global__ void __launch_bounds__(128) exponential_all(Params p) {
  store(p.out + thread(), bits_of(exponential(float_of(load(p.in + thread())))));
}

__global__ void __launch_bounds__(128) reciprocal_all(Params p) {
  store(p.out + thread(), bits_of(reciprocal(float_of(load(p.in + thread())))));
}

// Each thread has two elements, of which the second may be cleared.
template <class T>
__global__ void __launch_bounds__(128) clear_all(Params p) {
  const uint32_t word = load(p.in + thread());
  const Shared<T> own = shared_memory().as<T>() + 2 * thread();
  for (int j = 0; j < 2; ++j) store(own + j, static_cast<T>(word));
  clear_unless_above_zero<1>(float_of(word), Address<T>(own));
  for (int j = 0; j < 2; ++j) {
    store(p.out + (2 * thread() + j), static_cast<uint32_t>(load(own + j)));
  }
}

}  // namespace
}  // namespace snv2::SNV2_GPU
