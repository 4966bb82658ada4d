// Places of registers, by liveness: a kernel has thousands of virtual registers, of 32 values each,
// which would not stay in the host's caches.
#include <algorithm>
#include <array>
#include <climits>

#include "ptx/statements.h"

namespace snv2::ptx {
namespace {

constexpr size_t kClasses = 4;
constexpr uint32_t kClassBytes[kClasses] = {4, 2 * kLanes, 4 * kLanes, 8 * kLanes};

bool ends_block(const Statement& s) { return s.is("bra") || s.is("ret") || s.is("trap"); }

bool writes_first_operand(const Statement& s) {
  static constexpr std::string_view kNot[] = {"st",   "bar", "barrier", "cp", "griddepcontrol",
                                              "fence"};
  if (s.is("mbarrier")) return s.has("try_wait");
  return std::find(std::begin(kNot), std::end(kNot), s.words[0]) == std::end(kNot);
}

// One bit for each register.
class Set {
 public:
  explicit Set(size_t size) : words_((size + 63) / 64) {}

  bool has(int r) const { return (words_[word(r)] >> bit(r) & 1) != 0; }
  void add(int r) { words_[word(r)] |= uint64_t{1} << bit(r); }
  void add(const Set& other) {
    for (size_t i = 0; i < words_.size(); ++i) words_[i] |= other.words_[i];
  }
  // Adds those of `other` that are not in `without`. False if it had them all.
  bool add(const Set& other, const Set& without) {
    bool changed = false;
    for (size_t i = 0; i < words_.size(); ++i) {
      const uint64_t more = words_[i] | (other.words_[i] & ~without.words_[i]);
      changed |= more != words_[i];
      words_[i] = more;
    }
    return changed;
  }

 private:
  static size_t word(int r) { return static_cast<size_t>(r) / 64; }
  static int bit(int r) { return r % 64; }

  std::vector<uint64_t> words_;
};

struct BasicBlock {
  BasicBlock(size_t begin, size_t registers)
      : begin(begin), end(begin), used(registers), defined(registers), out(registers) {}

  size_t begin, end;         // statements
  std::vector<size_t> next;  // blocks
  Set used;                  // before they are defined; at last all that live where it begins
  Set defined;
  Set out;  // live where it ends
};

class Placer {
 public:
  explicit Placer(const Body& body) : body_(body), live_(body.registers.size()) {}

  RegisterPlaces place() {
    find_operands();
    find_blocks();
    find_live();
    find_ranges();
    return assign();
  }

 private:
  // From the first to the last half-step at which a register is needed; a statement reads in its
  // first half and writes in its second.
  struct Range {
    int first = INT_MAX, last = -1;

    void extend(size_t step) {
      first = std::min(first, static_cast<int>(step));
      last = std::max(last, static_cast<int>(step));
    }
  };

  void find_operands() {
    for (const Statement& s : body_.statements) {
      std::vector<int> uses, definitions;
      for (size_t k = 0; k < s.operands.size(); ++k) {
        const Operand& o = s.operands[k];
        const bool written = k == 0 && writes_first_operand(s) && o.kind != Operand::Kind::kMemory;
        collect(o, written ? definitions : uses);
      }
      if (s.predicate >= 0) {  // lanes that do not take part keep what was there
        uses.push_back(s.predicate);
        uses.insert(uses.end(), definitions.begin(), definitions.end());
      }
      uses_.push_back(std::move(uses));
      definitions_.push_back(std::move(definitions));
    }
  }

  static void collect(const Operand& o, std::vector<int>& found) {
    if (o.reg >= 0) found.push_back(o.reg);
    if (o.second >= 0) found.push_back(o.second);
    for (const Operand& part : o.parts) collect(part, found);
  }

  void find_blocks() {
    const size_t n = body_.statements.size();
    std::vector<bool> leads(n + 1);
    leads[0] = true;
    for (size_t i = 0; i < n; ++i) {
      const Statement& s = body_.statements[i];
      if (s.target >= 0) leads[static_cast<size_t>(s.target)] = true;
      if (ends_block(s)) leads[i + 1] = true;
    }
    std::vector<size_t> block_of(n + 1);
    for (size_t i = 0; i < n; ++i) {
      if (leads[i]) blocks_.emplace_back(i, body_.registers.size());
      blocks_.back().end = i + 1;
      block_of[i] = blocks_.size() - 1;
    }
    for (BasicBlock& b : blocks_) {
      const Statement& last = body_.statements[b.end - 1];
      if (last.target >= 0 && static_cast<size_t>(last.target) < n) {
        b.next.push_back(block_of[static_cast<size_t>(last.target)]);
      }
      if ((!ends_block(last) || last.predicate >= 0) && b.end < n) {
        b.next.push_back(block_of[b.end]);
      }
    }
  }

  void find_live() {
    for (BasicBlock& b : blocks_) {
      for (size_t i = b.begin; i < b.end; ++i) {
        for (const int r : uses_[i]) {
          if (!b.defined.has(r)) b.used.add(r);
        }
        for (const int r : definitions_[i]) b.defined.add(r);
      }
    }
    for (bool changed = true; changed;) {
      changed = false;
      for (auto b = blocks_.rbegin(); b != blocks_.rend(); ++b) {
        for (const size_t next : b->next) b->out.add(blocks_[next].used);
        changed |= b->used.add(b->out, b->defined);
      }
    }
  }

  void find_ranges() {
    for (const BasicBlock& b : blocks_) {
      for (size_t r = 0; r < live_.size(); ++r) {
        if (b.used.has(static_cast<int>(r))) live_[r].extend(2 * b.begin);
        if (b.out.has(static_cast<int>(r))) live_[r].extend(2 * b.end - 1);
      }
      for (size_t i = b.begin; i < b.end; ++i) {
        for (const int r : uses_[i]) live_[static_cast<size_t>(r)].extend(2 * i);
        for (const int r : definitions_[i]) live_[static_cast<size_t>(r)].extend(2 * i + 1);
      }
    }
    for (const Body::Special& s : body_.specials) {  // set before the kernel begins
      live_[static_cast<size_t>(s.reg)] = {-1, INT_MAX};
    }
  }

  // Linear scan.
  RegisterPlaces assign() const {
    std::vector<size_t> order;
    for (size_t r = 0; r < live_.size(); ++r) {
      if (live_[r].last >= 0) order.push_back(r);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return live_[a].first < live_[b].first; });
    std::vector<uint32_t> slots(live_.size());
    std::array<std::vector<size_t>, kClasses> active;
    std::array<std::vector<uint32_t>, kClasses> free;
    std::array<uint32_t, kClasses> used{};
    for (const size_t r : order) {
      const auto kind = static_cast<size_t>(body_.registers[r]);
      const auto ended = [&](size_t other) { return live_[other].last < live_[r].first; };
      for (const size_t other : active[kind]) {
        if (ended(other)) free[kind].push_back(slots[other]);
      }
      active[kind].erase(std::remove_if(active[kind].begin(), active[kind].end(), ended),
                         active[kind].end());
      if (free[kind].empty()) {
        slots[r] = used[kind]++;
      } else {
        slots[r] = free[kind].back();
        free[kind].pop_back();
      }
      active[kind].push_back(r);
    }
    RegisterPlaces result{std::vector<Place>(live_.size()), 0};
    std::array<size_t, kClasses> base{};
    for (size_t kind = 0; kind < kClasses; ++kind) {
      base[kind] = result.blocks * sizeof(Block);
      result.blocks += (used[kind] * kClassBytes[kind] + sizeof(Block) - 1) / sizeof(Block);
    }
    for (size_t r = 0; r < live_.size(); ++r) {
      const auto kind = static_cast<size_t>(body_.registers[r]);
      result.places[r] = static_cast<Place>(base[kind] + slots[r] * kClassBytes[kind]);
    }
    return result;
  }

  const Body& body_;
  std::vector<std::vector<int>> uses_, definitions_;  // of each statement
  std::vector<BasicBlock> blocks_;
  std::vector<Range> live_;
};

}  // namespace

RegisterPlaces place_registers(const Body& body) { return Placer(body).place(); }

}  // namespace snv2::ptx
