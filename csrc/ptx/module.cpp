// From PTX text to kernels whose bodies are not yet read.
#include <cctype>
#include <cstdlib>

#include "ptx/kernel.h"
#include "ptx/text.h"

namespace snv2::ptx {
namespace {

using std::string_view;

void blank_comments(std::string& text) {
  for (size_t at = text.find('/'); at != std::string::npos; at = text.find('/', at + 1)) {
    const char next = at + 1 < text.size() ? text[at + 1] : ' ';
    if (next != '/' && next != '*') continue;
    const size_t end = next == '/' ? text.find('\n', at) : text.find("*/", at + 2) + 2;
    text.replace(at, std::min(end, text.size()) - at, std::min(end, text.size()) - at, ' ');
  }
}

class ModuleReader {
 public:
  explicit ModuleReader(Module& module) : module_(module), rest_(module.text) {}

  void read() {
    for (rest_ = trim(rest_); !rest_.empty(); rest_ = trim(rest_)) {
      const string_view line = rest_.substr(0, rest_.find('\n'));
      if (line.find(".entry ") != string_view::npos) {
        entry();
      } else if (line.rfind(".section", 0) == 0) {
        rest_.remove_prefix(matching_brace(rest_, rest_.find('{')) + 1);
      } else if (line.rfind(".extern .shared", 0) == 0) {
        const size_t end = rest_.find(';');
        module_.shared_names.emplace_back(parse_declaration(rest_.substr(0, end)).name);
        rest_.remove_prefix(end + 1);
      } else {
        directive(line);
        rest_.remove_prefix(line.size());
      }
    }
  }

 private:
  void directive(string_view line) {
    const std::string text(line);
    if (line.rfind(".target", 0) == 0) {
      module_.architecture = std::atoi(text.c_str() + text.find("sm_") + 3);
    } else if (line.rfind(".file", 0) == 0) {
      const size_t quote = text.find('"');
      const std::string path = text.substr(quote + 1, text.rfind('"') - quote - 1);
      module_.files[std::atoi(text.c_str() + 6)] = path.substr(path.rfind('/') + 1);
    } else if (line.rfind(".version", 0) != 0 && line.rfind(".address_size", 0) != 0) {
      cannot_read(line);
    }
  }

  // .visible .entry name(parameters) .maxntid x, y, z { body }
  void entry() {
    rest_.remove_prefix(rest_.find(".entry ") + 7);
    const string_view name = leading_name(rest_);
    Kernel& kernel = module_.kernels[std::string(name)];
    kernel.module = &module_;
    kernel.name = name;
    const size_t open = rest_.find('{');
    string_view head = rest_.substr(name.size(), open - name.size());
    const size_t end = head.find(')');
    if (head.find('(') < end) {
      const size_t begin = head.find('(') + 1;
      for (const string_view one : split_operands(head.substr(begin, end - begin))) {
        const Declaration d = parse_declaration(one);
        const uint32_t offset = (kernel.parameter_bytes + d.align - 1) / d.align * d.align;
        kernel.parameters.push_back({std::string(d.name), offset, d.bytes});
        kernel.parameter_bytes = offset + d.bytes;
      }
      head.remove_prefix(end);
    }
    const size_t limit = head.find(".maxntid ");
    if (limit != string_view::npos) {
      kernel.max_threads = static_cast<uint32_t>(std::atoi(head.data() + limit + 9));
    }
    const size_t close = matching_brace(rest_, open);
    kernel.body = rest_.substr(open + 1, close - open - 1);
    rest_.remove_prefix(close + 1);
  }

  Module& module_;
  string_view rest_;
};

}  // namespace

std::unique_ptr<Module> parse_module(std::string text) {
  auto module = std::make_unique<Module>();
  module->text = std::move(text);
  blank_comments(module->text);
  ModuleReader(*module).read();
  return module;
}

std::string name_of(const Kernel& kernel, int32_t location) {
  std::string name;
  for (int32_t at = location; at >= 0; at = kernel.locations[static_cast<size_t>(at)].call) {
    const Location& place = kernel.locations[static_cast<size_t>(at)];
    const auto file = kernel.module->files.find(place.file);
    if (at != location) name += " in ";
    name += (file != kernel.module->files.end() ? file->second : "?") + ":" +
            std::to_string(place.line);
  }
  return name;
}

}  // namespace snv2::ptx
