#include "ptx/statements.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <map>

#include "ptx/machine.h"
#include "ptx/text.h"

namespace snv2::ptx {
namespace {

using std::string_view;

RegisterClass class_of(string_view type) {
  if (type == "pred") return RegisterClass::kPredicate;
  const uint32_t bytes = bytes_of_type(type);
  if (bytes <= 2) return RegisterClass::k16;
  return bytes == 4 ? RegisterClass::k32 : RegisterClass::k64;
}

class BodyReader {
 public:
  explicit BodyReader(const Kernel& kernel) : kernel_(kernel), scopes_(1) {
    body_.locations.emplace_back();
  }

  Body read() {
    for (string_view rest = trim(kernel_.body); !rest.empty(); rest = trim(rest)) {
      if (rest[0] == '{' || rest[0] == '}' || rest[0] == ';') {
        if (rest[0] == '{') scopes_.emplace_back();
        if (rest[0] == '}') scopes_.pop_back();
        rest.remove_prefix(1);
      } else if (rest.rfind(".loc", 0) == 0) {
        const size_t end = std::min(rest.find('\n'), rest.size());
        locate(rest.substr(0, end));
        rest.remove_prefix(end);
      } else if (const size_t end = end_of_label(rest); end != 0) {
        labels_[leading_name(rest)] = static_cast<int>(body_.statements.size());
        rest.remove_prefix(end);
      } else {
        const size_t semicolon = rest.find(';');
        if (semicolon == string_view::npos) cannot_read(rest);
        const string_view text = trim(rest.substr(0, semicolon));
        rest.remove_prefix(semicolon + 1);
        if (text[0] == '.') {
          directive(text);
        } else {
          statement(text);
        }
      }
    }
    for (Statement& s : body_.statements) {
      if (!s.is("bra")) continue;
      const auto found = labels_.find(branches_[&s - body_.statements.data()]);
      if (found == labels_.end()) cannot_read(s.text);
      s.target = found->second;
    }
    return std::move(body_);
  }

 private:
  // Names declared between two braces: single registers, and %r<9> for %r0 to %r8.
  struct Scope {
    std::map<string_view, int> registers;
    std::map<string_view, RegisterClass> ranges;
  };

  // Past the colon, 0 if `s` begins with no label.
  static size_t end_of_label(string_view s) {
    const size_t name = leading_name(s).size();
    const size_t at = s.find_first_not_of(" \t", name);
    return name > 0 && at != string_view::npos && s[at] == ':' ? at + 1 : 0;
  }

  // ".loc file line column", and where it is inlined "..., inlined_at file line column": that is
  // the place of a call, which may be inlined itself.
  void locate(string_view s) {
    Location l;
    const std::string text(s);
    std::sscanf(text.c_str(), ".loc %d %d", &l.file, &l.line);
    const size_t at = text.rfind("inlined_at");
    if (at != std::string::npos) {
      Location call;
      std::sscanf(text.c_str() + at, "inlined_at %d %d", &call.file, &call.line);
      const auto [known, is_new] =
          calls_.try_emplace({call.file, call.line}, static_cast<int32_t>(body_.locations.size()));
      if (is_new) body_.locations.push_back(call);
      l.call = known->second;
    }
    calls_[{l.file, l.line}] = static_cast<int32_t>(body_.locations.size());
    body_.locations.push_back(l);
  }

  void directive(string_view s) {
    const string_view word = leading_name(s.substr(1));
    if (word == "pragma") return;
    if (word != "reg") cannot_read(s);
    s = trim(s.substr(1 + word.size()));
    const string_view type = leading_name(s.substr(1));
    const RegisterClass kind = class_of(type);
    for (const string_view name : split_operands(s.substr(1 + type.size()))) {
      const size_t angle = name.find('<');
      if (angle != string_view::npos) {
        scopes_.back().ranges[name.substr(0, angle)] = kind;
      } else {
        scopes_.back().registers[name] = new_register(kind);
      }
    }
  }

  void statement(string_view text) {
    Statement s;
    s.text = text;
    s.location = static_cast<int>(body_.locations.size()) - 1;
    if (text[0] == '@') {
      text.remove_prefix(1);
      s.negated = text[0] == '!';
      if (s.negated) text.remove_prefix(1);
      const string_view name = leading_name(text);
      s.predicate = find_register(name);
      if (s.predicate < 0) cannot_read(s.text);
      text = trim(text.substr(name.size()));
    }
    s.opcode = text.substr(0, text.find_first_of(" \t\n"));
    s.words = split(s.opcode, '.');
    text.remove_prefix(s.opcode.size());
    if (s.is("bra")) {
      branches_[static_cast<std::ptrdiff_t>(body_.statements.size())] = trim(text);
    } else {
      for (const string_view o : split_operands(text)) s.operands.push_back(operand(o));
    }
    body_.statements.push_back(std::move(s));
  }

  Operand operand(string_view s) {
    Operand o;
    if (s[0] == '{') {
      o.kind = Operand::Kind::kVector;
      for (const string_view part : split_operands(s.substr(1, s.rfind('}') - 1))) {
        o.parts.push_back(operand(part));
      }
    } else if (s[0] == '[') {
      o = address(trim(s.substr(1, s.rfind(']') - 1)));
    } else if (s[0] == '!') {
      o = operand(s.substr(1));
      o.negated = true;
    } else if (const size_t bar = s.find('|'); bar != string_view::npos) {
      o = operand(s.substr(0, bar));
      o.second = operand(s.substr(bar + 1)).reg;
    } else if (parse_number(s, o.number)) {
      o.kind = Operand::Kind::kNumber;
    } else if (s != "_") {
      o.reg = find_register(s);
      o.kind = Operand::Kind::kRegister;
      if (o.reg < 0) {
        if (!find_symbol(s, o)) cannot_read(s);
        o.kind = Operand::Kind::kAddress;
      }
    }
    return o;
  }

  // [register + number] or [symbol + number]
  Operand address(string_view s) {
    Operand o;
    o.kind = Operand::Kind::kMemory;
    const size_t plus = s.find('+');
    if (plus != string_view::npos && !parse_number(trim(s.substr(plus + 1)), o.number)) {
      cannot_read(s);
    }
    const string_view base = trim(s.substr(0, plus));
    o.reg = find_register(base);
    if (o.reg < 0 && !find_symbol(base, o)) cannot_read(s);
    return o;
  }

  // Adds the address of shared memory or of a parameter. False if the name is neither's.
  bool find_symbol(string_view name, Operand& o) const {
    const std::vector<std::string>& shared = kernel_.module->shared_names;
    if (std::find(shared.begin(), shared.end(), name) != shared.end()) {
      o.space = Space::kShared;
      o.number += kSharedBase;
      return true;
    }
    const auto found = std::find_if(kernel_.parameters.begin(), kernel_.parameters.end(),
                                    [&](const Kernel::Parameter& p) { return p.name == name; });
    if (found == kernel_.parameters.end()) return false;
    o.space = Space::kParameter;
    o.number += found->offset;
    return true;
  }

  int new_register(RegisterClass kind) {
    body_.registers.push_back(kind);
    return static_cast<int>(body_.registers.size()) - 1;
  }

  // -1 if there is none.
  int find_register(string_view name) {
    const string_view prefix = name.substr(0, name.find_last_not_of("0123456789") + 1);
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->registers.find(name);
      if (found != scope->registers.end()) return found->second;
      const auto range = scope->ranges.find(prefix);
      if (range != scope->ranges.end() && prefix.size() < name.size()) {
        return scope->registers[name] = new_register(range->second);
      }
    }
    const int special = special_index(name);
    if (special < 0) return -1;
    const int reg = scopes_[0].registers[name] = new_register(RegisterClass::k32);
    body_.specials.push_back({special, reg});
    return reg;
  }

  const Kernel& kernel_;
  Body body_;
  std::vector<Scope> scopes_;
  std::map<string_view, int> labels_;
  std::map<std::ptrdiff_t, string_view> branches_;  // statement to label
  std::map<std::pair<int, int>, int32_t> calls_;    // the last location of each line
};

}  // namespace

bool Statement::has(string_view word) const {
  return std::find(words.begin(), words.end(), word) != words.end();
}

Body read_body(const Kernel& kernel) { return BodyReader(kernel).read(); }

}  // namespace snv2::ptx
