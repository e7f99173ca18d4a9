// What a solve is given and what it leaves behind: plain data, the same for every
// instruction set.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace sknode {

enum class Activation : int { sigmoid = 0, tanh = 1, softplus = 2, silu = 3, elu = 4, relu = 5 };

enum Status : int64_t { success = 0, max_steps = 1, step_too_small = 2, non_finite = 3 };

// Thrown through a call that was asked to end.
struct Interrupted {};

// Ends a call that takes long on request: the calling thread asks every now and then
// whether to go on, and tells the others.
class Watch {
public:
    explicit Watch(bool (*interrupted)()) : interrupted_(interrupted) {}
    void look() {
        if (stopped_.load(std::memory_order_relaxed)) throw Interrupted{};
        if (std::this_thread::get_id() != caller_) return;
        const auto now = Clock::now();
        if (now < next_) return;
        next_ = now + std::chrono::milliseconds(100);
        if (!interrupted_()) return;
        stopped_ = true;
        throw Interrupted{};
    }

private:
    using Clock = std::chrono::steady_clock;
    bool (*interrupted_)();
    const std::thread::id caller_ = std::this_thread::get_id();
    Clock::time_point next_ = Clock::now() + std::chrono::milliseconds(100);
    std::atomic<bool> stopped_{false};
};

// A linear layer as torch stores it: weight (out, in) row by row, bias (out,) or null.
struct Layer {
    const void* weight;
    const void* bias;
    int64_t out, in;
};

// A mixture of Gaussians in the axes of its components, as `MixtureField` has it.
struct Mixture {
    int64_t n_components = 0;  // none: there is no mixture
    const void *log_weights, *centres, *variances, *axes;
};

// What a flow of densities is beside its layers: see flow.h.
struct Flow {
    bool exists = false;
    int64_t n_frequencies = 0;
    Mixture mixture;
};

struct Model {
    std::vector<Layer> layers;
    Activation activation = Activation::tanh;
    bool uses_time = false;  // the last input of the first layer is time
    int64_t dim = 0;
    Flow flow;
};

struct Tableau {
    int n_stages, n_extended, degree, n_estimates;
    std::vector<double> a;      // (n_extended, n_extended)
    std::vector<double> c;      // (n_extended,)
    std::vector<double> error;  // (n_estimates, n_stages)
    std::vector<double> dense;  // (n_extended, degree)
};

struct Control {
    double rtol, atol;
    double first_step;  // not positive: chosen
    double min_step;
    double step_size;  // not positive: adaptive steps
    double error_order;
    double pcoeff, icoeff, dcoeff, safety, factor_min, factor_max;
    int n_history;
    int64_t max_steps;
    std::vector<double> grid;  // where steps end, from the first to the last; or empty
};

struct Problem {
    Model model;
    Tableau tableau;
    Control control;
    int64_t batch, n_times;
    int64_t times_stride;  // 0: one grid for all samples
    const double* times;   // ascending or descending rows
    const void* y0;        // (batch, dim)
    void* y;               // (batch, n_times, dim)
    // (batch,)
    int64_t *status, *n_steps, *n_accepted, *n_rejected, *n_dense, *n_evaluations, *next_output;
    double* t_reached;
    bool record;
    int threads;
    bool worth_threads;     // whether there is work for several, used or not
    bool (*interrupted)();  // for `Watch`
};

struct LayerGradient {
    void* weight;
    void* bias;  // or null
};

struct ReverseProblem {
    const void* grad;  // (batch, n_times, dim)
    void* grad_y0;     // (batch, dim)
    std::vector<LayerGradient> layers;
    int threads;
    bool (*interrupted)();
};

// A solve backwards, of states and cotangents. In its `solve`, the states at the output
// times are given and those at the start are not; a lane without a scale stays.
struct AdjointProblem {
    Problem solve;
    const void* grad;     // (batch, n_times, dim)
    const double* last;   // (batch,), the times that were reached
    const double* scale;  // (batch,), of the cotangents, or zero
    void* grad_y;         // (batch, dim), what goes back to the first time
    std::vector<LayerGradient> layers;
};

// A gated recurrent unit, as torch.nn.GRUCell has it, and the series that it reads from
// their last row to their first.
struct Recurrence {
    const void* parameters[4];  // weights of inputs and state, their biases
    int64_t n_inputs, size;
    int64_t batch, length;
    const void* inputs;      // (batch, length, n_inputs)
    const int64_t* lengths;  // (batch,)
    void* states;            // states before rows, (tiles, length, size, LANES), or null
    void* last;              // (batch, size)
    int threads;
    bool (*interrupted)();  // for `Watch`
};

struct RecurrenceReverse {
    Recurrence forward;
    const void* grad;    // (batch, size)
    void* gradients[4];  // of the parameters
};

// The rows that a perceptron without time is evaluated at.
struct Evaluation {
    Model model;  // `dim` is the number of its inputs
    int64_t rows = 0;
    const void* x = nullptr;  // (rows, inputs)
    void* out = nullptr;      // (rows, outputs), or null
    int threads = 1;
    bool (*interrupted)() = nullptr;  // for `Watch`
};

struct EvaluationReverse {
    Evaluation forward;
    const void* grad;  // (rows, outputs)
    void* grad_x;      // (rows, inputs), or null
    std::vector<LayerGradient> layers;
};

// The steps of a solve, kept for going back over them.
struct Recording {
    virtual ~Recording() = default;
    virtual void reverse(const ReverseProblem& problem) const = 0;
    // The memory that steps take, in bytes; it grows with their number.
    virtual int64_t bytes() const = 0;
};

// Solves the problem; returns its recording, empty unless one was asked for.
using Solver = std::unique_ptr<Recording> (*)(const Problem&);

using AdjointSolver = void (*)(const AdjointProblem&);

struct Solvers {
    Solver in_float, in_double;
    AdjointSolver adjoint_in_float, adjoint_in_double;
    void (*recur_in_float)(const Recurrence&);
    void (*recur_in_double)(const Recurrence&);
    void (*recur_back_in_float)(const RecurrenceReverse&);
    void (*recur_back_in_double)(const RecurrenceReverse&);
    void (*evaluate_in_float)(const Evaluation&);
    void (*evaluate_in_double)(const Evaluation&);
    void (*evaluate_back_in_float)(const EvaluationReverse&);
    void (*evaluate_back_in_double)(const EvaluationReverse&);
};

Solvers solvers_baseline();
#if defined(SKNODE_X86)
Solvers solvers_avx2();
Solvers solvers_avx512();
#endif

}  // namespace sknode
