#pragma once

#include <nanobind/nanobind.h>

namespace louver {

void bind_libraries(nanobind::module_ & m);
void bind_runtime(nanobind::module_ & m);
void bind_testing(nanobind::module_ & m);

}  // namespace louver
