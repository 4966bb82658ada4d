// What ThreadSanitizer reports, in a build for it (SNV2_TSAN).
#pragma once

#include <string>

#ifdef SNV2_TSAN
constexpr bool kTsan = true;
#else
constexpr bool kTsan = false;
#endif

// The reports since the last call: for each its kind, and the functions that both threads were in.
// Those that nobody asks for make the program fail.
std::string take_tsan_reports();

// run_all_tests(), and that no report is left.
int run_all_tests_and_check_reports();
