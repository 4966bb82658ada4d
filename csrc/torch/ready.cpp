// snv2_kernels._native.Ready: the short way from a call to the kernels.
//
// A forward has thrown Python's code and torch's out of the inner caches, and each function of
// either then costs some microseconds; so what is asked in each call is asked here, in a row.
#include "ready.h"

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "snv2/cpu.h"

namespace nb = nanobind;

namespace {

std::string requested_backend() {
  const char* const name = std::getenv("SNV2_BACKEND");
  return name == nullptr ? "" : name;
}

nb::object called(const nb::object& function, const std::vector<PyObject*>& arguments = {}) {
  PyObject* const result =
      PyObject_Vectorcall(function.ptr(), arguments.data(), arguments.size(), nullptr);
  if (result == nullptr) throw nb::python_error();
  return nb::steal(result);
}

nb::object attribute(const nb::object& object, const nb::str& name) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), name.ptr());
  if (value == nullptr) throw nb::python_error();
  return nb::steal(value);
}

bool is_true(const nb::object& value) {
  const int truth = PyObject_IsTrue(value.ptr());
  if (truth < 0) throw nb::python_error();
  return truth != 0;
}

nb::str interned(const char* name) { return nb::steal<nb::str>(PyUnicode_InternFromString(name)); }

// What is asked of torch, and of this package.
struct Asked {
  nb::module_ torch = nb::module_::import_("torch"), internals = nb::module_::import_("torch._C");
  nb::object tensor = torch.attr("Tensor"), strided = torch.attr("strided");
  nb::object is_grad_enabled = torch.attr("is_grad_enabled");
  nb::object is_any_autocast_enabled = internals.attr("_is_any_autocast_enabled");
  nb::object tracing_state = internals.attr("_get_tracing_state");
  nb::object are_transforms_active = internals.attr("_are_functorch_transforms_active");
  nb::object below_autograd = internals.attr("_AutoDispatchBelowAutograd");
  nb::object forward_ad = nb::module_::import_("torch.autograd.forward_ad");
  nb::object compiler = nb::module_::import_("torch.compiler");
  nb::object override = nb::module_::import_("snv2_kernels.backends").attr("_override").attr("get");
  // Attribute names are interned, as those that they are looked up with.
  nb::str shape = interned("shape"), dtype = interned("dtype"), layout = interned("layout"),
          is_cpu = interned("is_cpu"), level = interned("_current_level"), hold = interned("hold"),
          is_compiling = interned("_is_compiling_flag"), enter = interned("__enter__"),
          exit = interned("__exit__");
  nb::int_ no_level{-1};
};

// What imports may run other threads, so nobody waits for another's.
const Asked& asked() {
  static const Asked* kept = nullptr;
  if (kept == nullptr) {
    const auto* const made = new Asked;
    if (kept == nullptr) kept = made;
  }
  return *kept;
}

class BelowAutograd {
 public:
  BelowAutograd() : guard_(called(asked().below_autograd)) {
    called(attribute(guard_, asked().enter));
  }
  ~BelowAutograd() {
    const nb::object none = nb::none();
    called(attribute(guard_, asked().exit), {none.ptr(), none.ptr(), none.ptr()});
  }
  BelowAutograd(const BelowAutograd&) = delete;

 private:
  nb::object guard_;
};

class Ready {
 public:
  // snapshot: of the module; outside: a list of names that must hold; op: takes x and arguments.
  Ready(const nb::object& module, const nb::object& x, const nb::object& snapshot, nb::list outside,
        nb::object op, nb::tuple arguments)
      : module_(module.ptr()),
        shape_(attribute(x, asked().shape)),
        dtype_(attribute(x, asked().dtype)),
        override_(called(asked().override)),
        requested_(requested_backend()),
        isa_(snv2::cpu::isa()),
        prefetch_(snapshot.attr("prefetch")),
        rests_(snapshot.attr("rests")),
        outside_(std::move(outside)),
        op_(std::move(op)),
        arguments_(std::move(arguments)) {}

  nb::object operator()(const nb::object& module, const nb::object& x) const {
    if (!takes(module, x)) return nb::none();
    std::vector<PyObject*> given{x.ptr()};
    for (const nb::handle argument : arguments_) given.push_back(argument.ptr());
    const BelowAutograd below;
    return called(op_, given);
  }

  int traverse(visitproc visit, void* arg) const {
    for (const nb::handle object : {nb::handle(prefetch_), nb::handle(rests_), nb::handle(outside_),
                                    nb::handle(op_), nb::handle(arguments_)}) {
      Py_VISIT(object.ptr());
    }
    return 0;
  }
  void clear() {
    // What is let go may run code that asks again.
    const nb::object let_go[] = {std::move(prefetch_), std::move(rests_), std::move(op_),
                                 std::move(outside_), std::move(arguments_)};
    module_ = nullptr;
  }

 private:
  bool takes(const nb::object& module, const nb::object& x) const {
    const Asked& ask = asked();
    // Under a tracer extents are tensors, whose comparison warns.
    if (module.ptr() != module_ || !x.type().is(ask.tensor) ||
        !called(ask.tracing_state).is_none() || !attribute(x, ask.shape).equal(shape_)) {
      return false;
    }
    called(prefetch_);  // while the rest is looked at
    return attribute(x, ask.dtype).is(dtype_) && is_true(attribute(x, ask.is_cpu)) &&
           attribute(x, ask.layout).is(ask.strided) && !is_true(called(ask.is_grad_enabled)) &&
           !is_true(called(ask.is_any_autocast_enabled)) &&
           !is_true(called(ask.are_transforms_active)) &&
           attribute(ask.forward_ad, ask.level).equal(ask.no_level) &&
           !is_true(attribute(ask.compiler, ask.is_compiling)) &&
           called(ask.override).equal(override_) && requested_backend() == requested_ &&
           snv2::cpu::isa() == isa_ && is_true(called(rests_, {module.ptr()})) && names_hold();
  }

  bool names_hold() const {
    for (const nb::handle names : outside_) {
      if (!is_true(called(attribute(nb::borrow(names), asked().hold)))) return false;
    }
    return true;
  }

  const PyObject* module_;  // which owns this
  nb::object shape_, dtype_, override_;
  std::string requested_, isa_;
  nb::object prefetch_, rests_;
  nb::list outside_;
  nb::object op_;
  nb::tuple arguments_;
};

// Null while the object is being made.
Ready* ready_of(PyObject* object) {
  return nb::inst_ready(object) ? nb::inst_ptr<Ready>(object) : nullptr;
}

int traverse_ready(PyObject* object, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(object));
  const Ready* ready = ready_of(object);
  return ready == nullptr ? 0 : ready->traverse(visit, arg);
}

int clear_ready(PyObject* object) {
  if (Ready* ready = ready_of(object)) ready->clear();
  return 0;
}

PyType_Slot collected[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse_ready)},
                           {Py_tp_clear, reinterpret_cast<void*>(clear_ready)},
                           {0, nullptr}};

}  // namespace

void bind_ready(nb::module_& m) {
  nb::class_<Ready>(m, "Ready", "A forward for inputs of one kind; see snv2_kernels.nn.fused.",
                    nb::type_slots(collected))
      .def(nb::init<const nb::object&, const nb::object&, const nb::object&, nb::list, nb::object,
                    nb::tuple>(),
           nb::kw_only(), nb::arg("module"), nb::arg("x"), nb::arg("snapshot"), nb::arg("outside"),
           nb::arg("op"), nb::arg("arguments"))
      .def("__call__", &Ready::operator(), nb::arg("module"), nb::arg("x"),
           "The results, None where the long way is to be taken.");
}
