#include "ptx/operations.h"

namespace snv2::ptx {

Operation operation_named(const std::string& name) {
  static const Operations all = [] {
    Operations made;
    add_arithmetic(made);
    add_bits(made);
    add_conversions(made);
    add_lanes(made);
    add_matrices(made);
    add_memory(made);
    add_transactions(made);
    return made;
  }();
  const auto found = all.find(name);
  return found == all.end() ? nullptr : found->second;
}

}  // namespace snv2::ptx
