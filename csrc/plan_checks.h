// What the checks of the plan formats have in common. A plan comes from outside, so each of its
// words may be anything.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace snv2 {

// Number of steps of a plan whose header starts with the magic and that number.
inline int64_t checked_step_count(const int64_t* words, int64_t word_count, int64_t magic,
                                  int64_t header_words, int64_t step_words) {
  if (words == nullptr || word_count < header_words || words[0] != magic) {
    throw std::invalid_argument("plan: not a plan of this version");
  }
  const int64_t steps = words[1];
  if (steps < 1 || steps > (word_count - header_words) / step_words) {
    throw std::invalid_argument("plan: step_count does not fit its size");
  }
  return steps;
}

// Checks of one step after the other; all throw std::invalid_argument, naming step and field.
class PlanChecker {
 public:
  PlanChecker(const int64_t* tables, int64_t table_words)
      : tables_(tables), table_words_(table_words) {}

  void require(bool ok, const char* what) const {
    if (!ok) {
      throw std::invalid_argument("plan: step " + std::to_string(step_) + ": " + part_ + what);
    }
  }

  // A word that the step may have a use for; else it is 0.
  void used_or_zero(bool used, int64_t word, const char* what) const {
    require(used || word == 0, what);
  }

  // Keeps every product of two checked counts far from overflow.
  void count(int64_t value, const char* what) const {
    require(value >= 1 && value <= int64_t{1} << 24, what);
  }

  // [offset, offset + length) lies within [0, size).
  void range(int64_t offset, int64_t length, int64_t size, const char* what) const {
    require(offset >= 0 && length >= 0 && length <= size && offset <= size - length, what);
  }

  // The table lies within the plan; its entries are for the caller to look at.
  const int64_t* table(int64_t offset, int64_t length, const char* what) const {
    range(offset, length, table_words_, what);
    return tables_ + offset;
  }

  // The same, with entries in [0, limit).
  void table(int64_t offset, int64_t length, int64_t limit, const char* what) const {
    const int64_t* const entries = table(offset, length, what);
    for (int64_t i = 0; i < length; ++i) require(entries[i] >= 0 && entries[i] < limit, what);
  }

  int64_t table_words() const { return table_words_; }
  void next_step() { ++step_, part_ = ""; }
  // What is named from here on is a field of this part of the step: "main." or the like.
  void in_part(const char* part) { part_ = part; }
  int64_t step() const { return step_; }

 private:
  const int64_t* tables_;
  int64_t table_words_;
  int64_t step_ = 0;
  const char* part_ = "";
};

}  // namespace snv2
