// The kernels for processors with avx2.
#include "standard.h"

#if defined(SKNODE_X86)
// after the standard headers: their functions are shared and must run everywhere
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define SKNODE_VECTOR_BYTES 32
#define SKNODE_REGISTERS 16

namespace sknode {
namespace avx2 {
#include "simd.h"
#include "network.h"
#include "flow.h"
#include "stepper.h"
#include "solve.h"
#include "adjoint.h"
#include "recurrent.h"
#include "perceptron.h"
}  // namespace avx2

Solvers solvers_avx2() {
    return {avx2::solve<float>, avx2::solve<double>, avx2::adjoint<float>, avx2::adjoint<double>,
            avx2::recur<float>, avx2::recur<double>, avx2::recur_back<float>, avx2::recur_back<double>,
            avx2::evaluate<float>, avx2::evaluate<double>, avx2::evaluate_back<float>, avx2::evaluate_back<double>};
}
}  // namespace sknode

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
