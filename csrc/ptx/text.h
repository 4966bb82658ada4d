// Scanning PTX text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace snv2::ptx {

[[noreturn]] void cannot_read(std::string_view what);

std::string_view trim(std::string_view s);
bool is_name_character(char c);
// The name that `s` begins with.
std::string_view leading_name(std::string_view s);
std::vector<std::string_view> split(std::string_view s, char at);
// At the commas that are in no brackets.
std::vector<std::string_view> split_operands(std::string_view s);
// Where the brace at `open` ends.
size_t matching_brace(std::string_view s, size_t open);
// An integer, or the bits of a floating-point number such as 0f3F800000.
bool parse_number(std::string_view s, uint64_t& value);
// Of a type such as u32 or f16x2; 0 for a predicate.
uint32_t bytes_of_type(std::string_view type);

// ".param .align 16 .b8 name[32]" and the like.
struct Declaration {
  std::string_view name;
  uint32_t align = 1;
  uint32_t bytes = 0;
};
Declaration parse_declaration(std::string_view s);

}  // namespace snv2::ptx
