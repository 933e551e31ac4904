#pragma once

#include <nanobind/nanobind.h>

namespace louver {

class Runtime;

void bind_libraries(nanobind::module_ & m);
void bind_runtime(nanobind::module_ & m);
void bind_capture(nanobind::class_<Runtime> & runtime);
void bind_testing(nanobind::module_ & m);
void bind_benchmark(nanobind::module_ & testing);

}  // namespace louver
