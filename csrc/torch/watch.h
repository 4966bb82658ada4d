#pragma once

#include <pybind11/pybind11.h>

void bind_snapshot(pybind11::module_& m);
