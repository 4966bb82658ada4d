// What ThreadSanitizer reports, in a build for it (SNV2_TSAN).
#pragma once

#include <string>

#ifdef SNV2_TSAN
constexpr bool kTsan = true;
#else
constexpr bool kTsan = false;
#endif

// The reports since the last call: for each its kind, and the functions that both threads were in.
std::string take_tsan_reports();
