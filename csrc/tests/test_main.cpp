// [part of a test's name]: all tests pass, and ThreadSanitizer reports nothing.
// [--race] PART "what is wrong"...: one of them fails, and says so in these words. That is for
// copies of kernels with a fault. In a build for ThreadSanitizer a race is found by it as well,
// without the emulator's help.
#include <cstdio>
#include <cstring>

#include "check.h"
#include "emulator/emulator.h"
#include "race_reports.h"

namespace {

int expect_success(const std::vector<Test>& tests) {
  bool failed = false;
  for (const Test& test : tests) {
    const std::string wrong = run_test(test) + take_tsan_reports();
    std::printf("%s %s\n%s", wrong.empty() ? "ok    " : "FAILED", test.name.c_str(), wrong.c_str());
    failed |= !wrong.empty();
  }
  return failed ? 1 : 0;
}

int expect_failure(const std::vector<Test>& tests, bool race, char** words, int count) {
  stops_at_failure() = true;
  for (const Test& test : tests) {
    const std::string wrong = run_test(test);
    if (wrong.empty()) continue;
    std::printf("%s: %s", test.name.c_str(), wrong.c_str());
    for (int i = 0; i < count; ++i) {
      if (wrong.find(words[i]) == std::string::npos) {
        std::printf("FAILED: no \"%s\" in it\n", words[i]);
        return 1;
      }
    }
    if (!kTsan || !race) return 0;
    take_tsan_reports();
    snv2::emulator::check_races(false);
    run_test(test);
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
  std::vector<Test> tests;
  for (const Test& test : all_tests()) {
    if (argc < 2 || test.name.find(argv[1]) != std::string::npos) tests.push_back(test);
  }
  if (tests.empty()) {
    std::printf("no such test\n");
    return 1;
  }
  return argc <= 2 ? expect_success(tests) : expect_failure(tests, race, argv + 2, argc - 2);
}
