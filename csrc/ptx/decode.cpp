// From statements to instructions.
#include <algorithm>
#include <map>

#include "ptx/operations.h"
#include "ptx/statements.h"
#include "ptx/text.h"

namespace snv2::ptx {
namespace {

using std::string_view;
using Kind = Operand::Kind;

class Decoder {
 public:
  explicit Decoder(Kernel& kernel) : kernel_(kernel), body_(read_body(kernel)) {}

  void decode() {
    const RegisterPlaces registers = place_registers(body_);
    places_ = registers.places;
    std::vector<Instruction> code;
    for (const Statement& s : body_.statements) {
      statement_ = &s;
      instruction_ = {};
      instruction_.location = s.location;
      instruction_.text = s.text;
      if (s.predicate >= 0) {
        instruction_.predicate = place_of(s.predicate);
        instruction_.negated = s.negated;
      }
      decode_statement();
      code.push_back(instruction_);
    }
    Instruction end;
    end.flow = Flow::kReturn;
    code.push_back(end);
    for (const Body::Special& s : body_.specials) {
      kernel_.specials.push_back({s.index, place_of(s.reg)});
    }
    kernel_.locations = std::move(body_.locations);
    kernel_.register_blocks = registers.blocks;
    kernel_.executed.assign(code.size(), 0);
    kernel_.code = std::move(code);
  }

 private:
  [[noreturn]] void refuse() const { cannot_read(statement_->text); }
  void require(bool fine) const {
    if (!fine) refuse();
  }
  const Operand& operand(size_t k) const {
    require(k < statement_->operands.size());
    return statement_->operands[k];
  }
  string_view type() const { return statement_->words.back(); }
  void set_operation(const std::string& name) {
    instruction_.operation = operation_named(name);
    require(instruction_.operation != nullptr);
  }

  // Places of operands ------------------------------------------------------------------------

  Place place_of(int reg) const { return places_[static_cast<size_t>(reg)]; }
  uint32_t bytes_of(int reg) const {
    static constexpr uint32_t kBytes[] = {0, 2, 4, 8};
    return kBytes[static_cast<size_t>(body_.registers[static_cast<size_t>(reg)])];
  }

  Place constant(uint64_t value, uint32_t bytes) {
    const auto [found, added] = constants_.try_emplace({value, bytes}, 0);
    if (added) {
      const size_t at = kernel_.constants.size();
      kernel_.constants.resize(at + std::max<size_t>(1, kLanes * bytes / sizeof(Block)));
      for (uint32_t l = 0; l < kLanes; ++l) {
        std::memcpy(kernel_.constants[at].bytes + size_t{l} * bytes, &value, bytes);
      }
      found->second = static_cast<Place>(at * sizeof(Block)) | kConstantBit;
    }
    return found->second;
  }

  // Of a register or number of so many bytes; 0 is for a predicate.
  Place place_of(const Operand& o, uint32_t bytes) {
    require(!o.negated && o.second < 0);
    switch (o.kind) {
      case Kind::kRegister:
        require(bytes_of(o.reg) == bytes);
        return place_of(o.reg);
      case Kind::kNumber:
      case Kind::kAddress:
        if (bytes == 0) return constant(o.number != 0 ? kAllLanes : 0, sizeof kAllLanes);
        return constant(o.number, bytes);
      case Kind::kDropped:
        return kNowhere;
      default:
        refuse();
    }
  }
  Place place_of(size_t k, uint32_t bytes) { return place_of(operand(k), bytes); }

  // All parts of a vector at the end of the list.
  void append(const Operand& vector, size_t parts, uint32_t bytes) {
    require(vector.kind == Kind::kVector && vector.parts.size() == parts);
    for (const Operand& part : vector.parts) append(place_of(part, bytes));
  }
  void append(Place place) {
    if (instruction_.list < 0) instruction_.list = static_cast<int32_t>(kernel_.operands.size());
    kernel_.operands.push_back(place);
  }

  // Instructions ------------------------------------------------------------------------------

  void decode_statement() {
    const Statement& s = *statement_;
    const std::string opcode(s.opcode);
    if (s.is("bra")) {
      instruction_.flow = Flow::kBranch;
      instruction_.immediate = s.target;
    } else if (s.is("ret")) {
      instruction_.flow = Flow::kReturn;
    } else if (s.is("trap")) {
      instruction_.flow = Flow::kTrap;
    } else if (s.is("bar") || s.is("barrier")) {
      barrier();
    } else if (s.is("mbarrier")) {
      transaction_barrier();
    } else if (s.is("st") && s.has("async")) {
      store_async();
    } else if (s.is("ld") || s.is("st")) {
      load_or_store();
    } else if (s.is("atom")) {
      require(s.has("add"));
      address(operand(1));
      instruction_.d = place_of(0, 4);
      instruction_.b = place_of(2, 4);
      instruction_.flow = Flow::kYield;
      set_operation("atom.add." + std::string(type()));
    } else if (s.is("cp")) {
      copy();
    } else if (s.is("ldmatrix")) {
      matrix();
    } else if (s.is("mma")) {
      instruction_.flow = Flow::kWholeWarp;
      append(operand(0), 4, 4);
      append(operand(1), 4, 4);
      append(operand(2), 2, 4);
      append(operand(3), 4, 4);
      set_operation(opcode);
    } else if (s.is("shfl")) {
      shuffle();
    } else if (s.is("griddepcontrol") || s.is("fence")) {
      set_operation(opcode);
    } else if (s.is("mov") &&
               (operand(0).kind == Kind::kVector || operand(1).kind == Kind::kVector)) {
      move_parts();
    } else if (s.is("cvt")) {
      convert();
    } else {
      elementwise();
    }
  }

  void barrier() {
    const Statement& s = *statement_;
    if (s.has("cluster")) {
      instruction_.flow = s.has("arrive") ? Flow::kClusterArrive : Flow::kClusterWait;
    } else if (s.has("warp")) {
      instruction_.flow = Flow::kMembers;
      append(place_of(0, 4));
      set_operation("bar.warp");
    } else {
      require(s.has("sync") && s.operands.size() == 1 && operand(0).kind == Kind::kNumber &&
              operand(0).number == 0);
      instruction_.flow = Flow::kBarrier;
    }
  }

  void address(const Operand& o) {
    require(o.kind == Kind::kMemory);
    const Statement& s = *statement_;
    require(!s.has("shared::cluster") && !s.has("local") && !s.has("const"));
    const bool shared = s.has("shared") || s.has("shared::cta");
    instruction_.space = s.has("global")  ? Space::kGlobal
                         : shared         ? Space::kShared
                         : s.has("param") ? Space::kParameter
                                          : Space::kGeneric;
    instruction_.a = o.reg >= 0 ? place_of(o.reg) : kNowhere;
    instruction_.wide_address = o.reg >= 0 && bytes_of(o.reg) == 8;
    instruction_.immediate = static_cast<int32_t>(o.number);
    require(o.reg >= 0 || o.space == instruction_.space);
  }

  void load_or_store() {
    const Statement& s = *statement_;
    const bool load = s.is("ld");
    address(operand(load ? 1 : 0));
    const Operand& value = operand(load ? 0 : 1);
    instruction_.elements = s.has("v2") ? 2 : s.has("v4") ? 4 : 1;
    if (s.has("acquire") || s.has("volatile")) instruction_.flow = Flow::kYield;
    uint32_t bytes = std::max(bytes_of_type(type()), 2u);
    const Operand& first = value.kind == Kind::kVector ? value.parts.at(0) : value;
    if (first.kind == Kind::kRegister) bytes = bytes_of(first.reg);
    if (value.kind == Kind::kVector) {
      append(value, instruction_.elements, bytes);
    } else {
      require(instruction_.elements == 1);
      (load ? instruction_.d : instruction_.b) = place_of(value, bytes);
    }
    const std::string kind =
        type()[0] == 'b' ? "u" + std::string(type().substr(1)) : std::string(type());
    set_operation((load ? "load." : "store.") + kind + "." + std::to_string(bytes));
  }

  // An address of 32 bits without more.
  Place shared_address(size_t k) {
    const Operand& o = operand(k);
    require(o.kind == Kind::kMemory && o.reg >= 0 && bytes_of(o.reg) == 4 && o.number == 0);
    return place_of(o.reg);
  }

  void transaction_barrier() {
    const Statement& s = *statement_;
    require(s.has("shared::cta") && s.has("b64"));
    instruction_.space = Space::kShared;
    if (s.has("init")) {
      instruction_.a = shared_address(0);
      instruction_.b = place_of(1, 4);
      return set_operation("mbarrier.init");
    }
    require(s.operands.size() == 3);
    instruction_.a = shared_address(1);
    instruction_.b = place_of(2, 4);
    if (s.has("try_wait")) {
      require(s.has("parity"));
      instruction_.flow = Flow::kTransactionWait;
      instruction_.d = place_of(0, 0);
      return set_operation("mbarrier.try_wait");
    }
    require(s.has("arrive") && s.has("expect_tx") && operand(0).kind == Kind::kDropped);
    instruction_.flow = Flow::kTransaction;
    set_operation("mbarrier.arrive.expect_tx");
  }

  // To [a] of the operands of the list; the barrier is at [c]. Both have the rank of a CTA.
  void store_async() {
    const Statement& s = *statement_;
    require(s.has("weak") && s.has("shared::cluster") && s.has("mbarrier::complete_tx::bytes") &&
            s.has("b32") && s.operands.size() == 3);
    instruction_.flow = Flow::kTransaction;
    instruction_.a = shared_address(0);
    instruction_.c = shared_address(2);
    instruction_.elements = s.has("v4") ? 4 : s.has("v2") ? 2 : 1;
    instruction_.element_bytes = 4;
    if (instruction_.elements == 1) {
      append(place_of(1, 4));
    } else {
      append(operand(1), instruction_.elements, 4);
    }
    set_operation("st.async");
  }

  // d bytes from b to a; the barrier is at [c].
  void copy_bulk() {
    const Statement& s = *statement_;
    require(s.has("shared::cluster") && s.has("global") && s.has("mbarrier::complete_tx::bytes") &&
            s.operands.size() == 4);
    const Operand& from = operand(1);
    require(from.kind == Kind::kMemory && from.reg >= 0 && bytes_of(from.reg) == 8 &&
            from.number == 0);
    instruction_.flow = Flow::kTransaction;
    instruction_.space = Space::kShared;
    instruction_.a = shared_address(0);
    instruction_.b = place_of(from.reg);
    instruction_.d = place_of(2, 4);
    instruction_.c = shared_address(3);
    set_operation("cp.async.bulk");
  }

  void copy() {
    const Statement& s = *statement_;
    if (s.has("bulk")) return copy_bulk();
    if (s.has("commit_group")) return set_operation("cp.async.commit_group");
    if (s.has("wait_group")) {
      instruction_.immediate = static_cast<int32_t>(operand(0).number);
      return set_operation("cp.async.wait_group");
    }
    require(s.has("async") && s.has("shared") && s.has("global") && s.operands.size() == 3);
    const Operand &to = operand(0), &from = operand(1);
    require(to.reg >= 0 && bytes_of(to.reg) == 4 && from.reg >= 0 && bytes_of(from.reg) == 8);
    instruction_.a = place_of(to.reg);
    instruction_.immediate = static_cast<int32_t>(to.number);
    instruction_.b = place_of(from.reg);
    instruction_.d = static_cast<int32_t>(from.number);
    const uint64_t bytes = operand(2).number;
    require(bytes == 16 || (s.has("ca") && (bytes == 4 || bytes == 8)));
    instruction_.element_bytes = static_cast<uint8_t>(bytes);
    set_operation("cp.async");
  }

  void matrix() {
    const Statement& s = *statement_;
    require(s.has("m8n8") && s.has("shared"));
    instruction_.flow = Flow::kWholeWarp;
    instruction_.elements = s.has("x4") ? 4 : s.has("x2") ? 2 : 1;
    instruction_.transposed = s.has("trans");
    address(operand(1));
    append(operand(0), instruction_.elements, 4);
    set_operation("ldmatrix");
  }

  void shuffle() {
    const Statement& s = *statement_;
    require(s.words.size() == 4 && s.words[1] == "sync");
    instruction_.flow = Flow::kMembers;
    instruction_.d = place_of(operand(0).reg);
    instruction_.a = place_of(1, 4);
    instruction_.b = place_of(2, 4);
    instruction_.c = place_of(3, 4);
    append(place_of(4, 4));
    append(operand(0).second >= 0 ? place_of(operand(0).second) : kNowhere);
    set_operation("shfl." + std::string(s.words[2]));
  }

  // mov d, {a, b} and mov {d, e}, a
  void move_parts() {
    const bool packs = operand(1).kind == Kind::kVector;
    const Operand& parts = operand(packs ? 1 : 0);
    const uint32_t whole = bytes_of_type(type());
    const uint32_t part = whole / static_cast<uint32_t>(parts.parts.size());
    append(parts, parts.parts.size(), part);
    if (packs) {
      instruction_.d = place_of(0, whole);
    } else {
      instruction_.a = place_of(1, whole);
    }
    set_operation((packs ? "pack." : "unpack.") + std::to_string(whole) + "." +
                  std::to_string(part));
  }

  void convert() {
    const Statement& s = *statement_;
    const uint32_t bytes = std::max(bytes_of_type(type()), 2u);
    const Operand& source = operand(1);
    const bool wider = source.kind == Kind::kRegister && bytes_of(source.reg) > bytes;
    const uint32_t from = wider ? bytes_of(source.reg) : bytes;
    instruction_.d = place_of(0, std::max(bytes_of_type(s.words[s.words.size() - 2]), 2u));
    instruction_.a = place_of(1, from);
    if (s.operands.size() == 3) instruction_.b = place_of(2, from);
    set_operation(std::string(s.opcode) + (wider ? " of " + std::to_string(from) : ""));
  }

  // All else: its operands have the bytes of its type, but for some.
  void elementwise() {
    const Statement& s = *statement_;
    const uint32_t bytes = bytes_of_type(type());
    const uint32_t wide = s.has("wide") ? 2 * bytes : bytes;
    const size_t count = s.operands.size();
    require(count >= 2 && count <= 5);
    instruction_.d = place_of(0, s.is("setp") ? 0 : wide);
    instruction_.a = place_of(1, bytes);
    if (count > 2)
      instruction_.b = place_of(2, s.is("shl") || s.is("shr") || s.is("mapa") ? 4 : bytes);
    if (count > 3) instruction_.c = place_of(3, s.is("selp") ? 0 : s.is("bfi") ? 4 : wide);
    if (count > 4) append(place_of(4, 4));
    require((count == 5) == s.is("bfi"));
    set_operation(std::string(s.opcode));
  }

  Kernel& kernel_;
  Body body_;
  std::vector<Place> places_;  // of registers
  std::map<std::pair<uint64_t, uint32_t>, Place> constants_;
  const Statement* statement_ = nullptr;
  Instruction instruction_;  // that it becomes
};

}  // namespace

void decode(Kernel& kernel) { Decoder(kernel).decode(); }

}  // namespace snv2::ptx
