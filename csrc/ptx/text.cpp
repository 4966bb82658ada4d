#include "ptx/text.h"

#include <algorithm>
#include <cctype>
#include <charconv>

#include "ptx/kernel.h"

namespace snv2::ptx {
namespace {

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

template <class T>
bool parse_digits(std::string_view s, int base, T& value) {
  const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), value, base);
  return error == std::errc() && end == s.data() + s.size();
}

}  // namespace

void cannot_read(std::string_view what) {
  throw Fault("the PTX interpreter cannot read: " + std::string(what));
}

std::string_view trim(std::string_view s) {
  while (!s.empty() && is_space(s.front())) s.remove_prefix(1);
  while (!s.empty() && is_space(s.back())) s.remove_suffix(1);
  return s;
}

bool is_name_character(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%';
}

std::string_view leading_name(std::string_view s) {
  return s.substr(
      0, static_cast<size_t>(std::find_if_not(s.begin(), s.end(), is_name_character) - s.begin()));
}

std::vector<std::string_view> split(std::string_view s, char at) {
  std::vector<std::string_view> parts;
  while (true) {
    const size_t end = s.find(at);
    if (end != 0 && !s.empty()) parts.push_back(s.substr(0, end));
    if (end == std::string_view::npos) return parts;
    s.remove_prefix(end + 1);
  }
}

std::vector<std::string_view> split_operands(std::string_view s) {
  std::vector<std::string_view> operands;
  int depth = 0;
  size_t from = 0;
  for (size_t i = 0; i <= s.size(); ++i) {
    if (i == s.size() || (s[i] == ',' && depth == 0)) {
      const std::string_view operand = trim(s.substr(from, i - from));
      if (!operand.empty()) operands.push_back(operand);
      from = i + 1;
    } else if (s[i] == '{' || s[i] == '[') {
      ++depth;
    } else if (s[i] == '}' || s[i] == ']') {
      --depth;
    }
  }
  return operands;
}

size_t matching_brace(std::string_view s, size_t open) {
  int depth = 0;
  for (size_t i = open; i < s.size(); ++i) {
    if (s[i] == '{') ++depth;
    if (s[i] == '}' && --depth == 0) return i;
  }
  cannot_read("braces that do not match");
}

bool parse_number(std::string_view s, uint64_t& value) {
  const bool minus = !s.empty() && s[0] == '-';
  if (minus) s = trim(s.substr(1));
  if (s.empty() || std::isdigit(static_cast<unsigned char>(s[0])) == 0) return false;
  const std::string_view kind = s.substr(0, 2);
  if (kind == "0f" || kind == "0F" || kind == "0x" || kind == "0X") {
    if (!parse_digits(s.substr(2), 16, value)) cannot_read(s);
  } else if (!parse_digits(s, 10, value)) {
    cannot_read(s);
  }
  if (minus) value = 0 - value;
  return true;
}

uint32_t bytes_of_type(std::string_view type) {
  if (type == "pred") return 0;
  if (type == "bf16") return 2;
  if (type == "f16x2" || type == "bf16x2" || type == "tf32") return 4;
  uint32_t bits = 0;
  if (!parse_digits(type.substr(1), 10, bits)) cannot_read("type " + std::string(type));
  return bits / 8;
}

Declaration parse_declaration(std::string_view s) {
  Declaration d;
  uint32_t element = 1;
  for (s = trim(s); !s.empty() && s[0] == '.'; s = trim(s)) {
    const std::string_view word = leading_name(s.substr(1));
    s = trim(s.substr(1 + word.size()));
    if (word == "align") {
      const std::string_view digits = leading_name(s);
      if (!parse_digits(digits, 10, d.align)) cannot_read(s);
      s.remove_prefix(digits.size());
    } else if (word != "param" && word != "ptr" && word != "global" && word != "shared" &&
               word != "extern") {
      element = bytes_of_type(word);
      d.align = std::max(d.align, element);
    }
  }
  d.name = leading_name(s);
  uint64_t count = 1;
  const size_t open = s.find('[');
  if (open != std::string_view::npos) {
    const std::string_view inside = trim(s.substr(open + 1, s.find(']') - open - 1));
    count = 0;  // as large as the launch says
    if (!inside.empty() && !parse_number(inside, count)) cannot_read(s);
  }
  d.bytes = element * static_cast<uint32_t>(count);
  return d;
}

}  // namespace snv2::ptx
