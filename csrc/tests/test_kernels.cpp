// test_kernels [part of a case's name]: all cases pass.
// test_kernels [--race] PART "what is wrong"...: one of them fails, and says so in these words.
// That is for copies of kernels with a fault. In a build for ThreadSanitizer a race is found by it
// as well, without the emulator's help.
#include <cstdio>
#include <cstring>

#include "emulator/emulator.h"
#include "kernel_cases.h"
#include "race_reports.h"

namespace {

using snv2::emulated::KernelCase;

std::string what_is_wrong(const KernelCase& c) {
  try {
    return c.run();
  } catch (const std::exception& error) {
    return error.what();
  }
}

int expect_success(const std::vector<KernelCase>& cases) {
  int failures = 0;
  for (const KernelCase& c : cases) {
    const std::string wrong = what_is_wrong(c) + take_tsan_reports();
    std::printf("%s %s %s\n", wrong.empty() ? "ok    " : "FAILED", c.name.c_str(), wrong.c_str());
    failures += !wrong.empty();
  }
  return failures != 0 ? 1 : 0;
}

int expect_failure(const std::vector<KernelCase>& cases, bool race, char** words, int count) {
  for (const KernelCase& c : cases) {
    std::string wrong = what_is_wrong(c);
    if (wrong.empty()) continue;
    std::printf("%s: %s\n", c.name.c_str(), wrong.c_str());
    for (int i = 0; i < count; ++i) {
      if (wrong.find(words[i]) == std::string::npos) {
        std::printf("FAILED: no \"%s\" in it\n", words[i]);
        return 1;
      }
    }
    if (!kTsan || !race) return 0;
    take_tsan_reports();
    snv2::emulator::check_races(false);
    what_is_wrong(c);
    const std::string found = take_tsan_reports();
    std::printf("ThreadSanitizer: %s", found.c_str());
    if (found.find("data-race") != std::string::npos) return 0;
    std::printf("FAILED: ThreadSanitizer does not find it\n");
    return 1;
  }
  std::printf("FAILED: nothing is wrong\n");
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  const bool race = argc > 1 && std::strcmp(argv[1], "--race") == 0;
  if (race) ++argv, --argc;
  std::vector<KernelCase> cases;
  for (const auto& list : {snv2::emulated::depthwise_cases(), snv2::emulated::large_cases()}) {
    for (const KernelCase& c : list) {
      if (argc < 2 || c.name.find(argv[1]) != std::string::npos) cases.push_back(c);
    }
  }
  if (cases.empty()) {
    std::printf("no such case\n");
    return 1;
  }
  return argc <= 2 ? expect_success(cases) : expect_failure(cases, race, argv + 2, argc - 2);
}
