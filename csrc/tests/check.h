// The little that these tests need of a test framework, so that they build with a compiler alone.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <functional>
#include <string>
#include <vector>

struct Test {
  std::string name;
  std::function<void()> run;
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

// What failed in the test that runs, a line for each.
inline std::string& failures() {
  static std::string text;
  return text;
}

// Whether a test ends at its first failure. They go on unless that failure is what is asked for.
inline bool& stops_at_failure() {
  static bool stops = false;
  return stops;
}
struct Stopped {};

__attribute__((format(printf, 1, 2))) inline void add_failure(const char* format, ...) {
  std::va_list arguments, again;
  va_start(arguments, format);
  va_copy(again, arguments);
  std::string line(static_cast<size_t>(std::vsnprintf(nullptr, 0, format, arguments)) + 1, '\n');
  std::vsnprintf(&line[0], line.size(), format, again);
  va_end(again);
  va_end(arguments);
  line.back() = '\n';
  failures() += line;
}

// The cast chooses among functions of the same name: a test may be called like its kernel.
#define TEST(name)                                                           \
  static void name();                                                        \
  static const bool name##_registered =                                      \
      (all_tests().push_back({#name, static_cast<void (*)()>(name)}), true); \
  static void name()

#define CHECK(condition, ...)                                          \
  do {                                                                 \
    if (!(condition)) {                                                \
      add_failure("%s:%d: CHECK(%s)", __FILE__, __LINE__, #condition); \
      add_failure("" __VA_ARGS__);                                     \
      if (stops_at_failure()) throw Stopped();                         \
    }                                                                  \
  } while (false)

#define CHECK_THROWS(statement)       \
  do {                                \
    bool thrown = false;              \
    try {                             \
      statement;                      \
    } catch (const std::exception&) { \
      thrown = true;                  \
    }                                 \
    CHECK(thrown, "%s", #statement);  \
  } while (false)

// Returns what failed, nothing if nothing did.
inline std::string run_test(const Test& test) {
  failures().clear();
  try {
    test.run();
  } catch (const Stopped&) {
  } catch (const std::exception& error) {
    add_failure("%s", error.what());
  }
  return failures();
}

inline int run_all_tests() {
  bool failed = false;
  for (const Test& test : all_tests()) {
    const std::string wrong = run_test(test);
    std::printf("%s %s\n%s", wrong.empty() ? "ok    " : "FAILED", test.name.c_str(), wrong.c_str());
    failed |= !wrong.empty();
  }
  return failed ? 1 : 0;
}
