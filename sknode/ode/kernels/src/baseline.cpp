// The kernels for any processor.
#include "standard.h"

#define SKNODE_VECTOR_BYTES 16
#if defined(__aarch64__)
#define SKNODE_REGISTERS 32
#else
#define SKNODE_REGISTERS 16
#endif

namespace sknode {
namespace baseline {
#include "simd.h"
#include "network.h"
#include "flow.h"
#include "stepper.h"
#include "solve.h"
#include "adjoint.h"
#include "recurrent.h"
#include "perceptron.h"
}  // namespace baseline

Solvers solvers_baseline() {
    return {baseline::solve<float>, baseline::solve<double>, baseline::adjoint<float>, baseline::adjoint<double>,
            baseline::recur<float>, baseline::recur<double>, baseline::recur_back<float>, baseline::recur_back<double>,
            baseline::evaluate<float>, baseline::evaluate<double>, baseline::evaluate_back<float>, baseline::evaluate_back<double>};
}
}  // namespace sknode
