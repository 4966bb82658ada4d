// snv2_kernels._native.Program.
#pragma once

#include <nanobind/nanobind.h>

void bind_program(nanobind::module_& m);
