#pragma once

#include <nanobind/nanobind.h>

void bind_ready(nanobind::module_& m);
