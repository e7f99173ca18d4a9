// The kernels for processors with avx512.
#include "standard.h"

#if defined(SKNODE_X86)
// after the standard headers: their functions are shared and must run everywhere
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#define SKNODE_VECTOR_BYTES 64
#define SKNODE_REGISTERS 32

namespace sknode {
namespace avx512 {
#include "simd.h"
#include "network.h"
#include "flow.h"
#include "stepper.h"
#include "solve.h"
#include "adjoint.h"
#include "recurrent.h"
#include "perceptron.h"
}  // namespace avx512

Solvers solvers_avx512() {
    return {avx512::solve<float>, avx512::solve<double>, avx512::adjoint<float>, avx512::adjoint<double>,
            avx512::recur<float>, avx512::recur<double>, avx512::recur_back<float>, avx512::recur_back<double>,
            avx512::evaluate<float>, avx512::evaluate<double>, avx512::evaluate_back<float>, avx512::evaluate_back<double>};
}
}  // namespace sknode

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
