// The little that these tests need of a test framework, so that they build with a compiler alone.
#pragma once

#include <cstdio>
#include <exception>
#include <vector>

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

inline int& failures() {
  static int count = 0;
  return count;
}

#define TEST(name)                                                                    \
  static void name();                                                                 \
  static const bool name##_registered = (all_tests().push_back({#name, name}), true); \
  static void name()

#define CHECK(condition, ...)                                           \
  do {                                                                  \
    if (!(condition)) {                                                 \
      ++failures();                                                     \
      std::printf("%s:%d: CHECK(%s) ", __FILE__, __LINE__, #condition); \
      std::printf("" __VA_ARGS__);                                      \
      std::printf("\n");                                                \
    }                                                                   \
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

inline int run_all_tests() {
  for (const Test& test : all_tests()) {
    const int before = failures();
    test.run();
    std::printf("%s %s\n", failures() == before ? "ok    " : "FAILED", test.name);
  }
  return failures() == 0 ? 0 : 1;
}
