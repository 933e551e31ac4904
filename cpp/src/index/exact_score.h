// Dot products of float32 in exact arithmetic, by Shewchuk's expansions (J. R. Shewchuk, Adaptive Precision Floating-Point
// Arithmetic, 1997): a product of two float32 is exact in float64, and a sum of float64 is kept as several that do not overlap.
#pragma once

namespace louver {

// The float64 nearest to the sum of a[i] * b[i], ties to even. a, b: [n] finite, n <= 1024.
double exact_dot(const float * a, const float * b, int n);

// The sign of that sum less tau, in exact arithmetic: -1, 0, 1. tau is finite.
int compare_dot(const float * a, const float * b, int n, double tau);

}  // namespace louver
