// Threads that wait for work, shared by all indexes of the process.
#pragma once

#include <cstdint>
#include <functional>

namespace louver {

// Threads that the machine can run at once.
int hardware_threads();

// Calls f(i) for each i in 0..n, in this thread and in up to n_threads - 1 others, in no order. Calls from several threads at
// once take turns at the others: one that finds them busy works alone. If f throws, what is left is not begun, and one of the
// exceptions is thrown again here.
void parallel_for(int64_t n, int n_threads, const std::function<void(int64_t)> & f);

}  // namespace louver
