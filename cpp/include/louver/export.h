// Marks what liblouver-ggml offers.
#pragma once

#if defined(__GNUC__)
#define LOUVER_API __attribute__((visibility("default")))
#else
#define LOUVER_API
#endif
