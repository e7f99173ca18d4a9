// The kernels as a Python module, in the stable ABI of Python 3.11.
//
// Arrays come as addresses: the caller, kernels/__init__.py, has checked their types,
// shapes and layout and keeps them alive.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "standard.h"

namespace sknode {
namespace {

struct InstructionSet {
    const char* name;
    Solvers solvers;
    bool available;
};

std::vector<InstructionSet> instruction_sets() {
    std::vector<InstructionSet> sets;
#if defined(SKNODE_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    sets.push_back({"avx512", solvers_avx512(), avx512});
    sets.push_back({"avx2", solvers_avx2(), avx2});
#endif
    sets.push_back({"baseline", solvers_baseline(), true});
    return sets;
}

// Reads a tuple from front to back; the first error stays.
class Reader {
public:
    explicit Reader(PyObject* tuple) : tuple_(tuple) {
        if (!PyTuple_Check(tuple)) PyErr_SetString(PyExc_TypeError, "expected a tuple");
    }
    PyObject* object() {
        return PyErr_Occurred() ? nullptr : PyTuple_GetItem(tuple_, next_++);
    }
    int64_t integer() {
        PyObject* x = object();
        return x ? PyLong_AsLongLong(x) : 0;
    }
    double number() {
        PyObject* x = object();
        return x ? PyFloat_AsDouble(x) : 0;
    }
    void* address() {
        PyObject* x = object();
        return x ? PyLong_AsVoidPtr(x) : nullptr;
    }
    std::vector<double> numbers() {
        PyObject* x = object();
        char* data = nullptr;
        Py_ssize_t size = 0;
        if (!x || PyBytes_AsStringAndSize(x, &data, &size) < 0) return {};
        std::vector<double> values(size / sizeof(double));
        if (size) std::memcpy(values.data(), data, values.size() * sizeof(double));
        return values;
    }
    Py_ssize_t size() const { return PyTuple_Size(tuple_); }

private:
    PyObject* tuple_;
    Py_ssize_t next_ = 0;
};

Flow read_flow(PyObject* tuple) {
    Reader reader(tuple);
    Flow flow;
    flow.exists = true;
    flow.n_frequencies = reader.integer();
    Mixture& mixture = flow.mixture;
    mixture.n_components = reader.integer();
    for (const void** p : {&mixture.log_weights, &mixture.centres, &mixture.variances,
                           &mixture.axes})
        *p = reader.address();
    return flow;
}

Model read_model(PyObject* tuple) {
    Reader reader(tuple);
    Model model;
    model.activation = static_cast<Activation>(reader.integer());
    model.uses_time = reader.integer() != 0;
    model.dim = reader.integer();
    PyObject* flow = reader.object();
    if (!flow) return model;
    if (PyTuple_Check(flow)) model.flow = read_flow(flow);
    while (!PyErr_Occurred() && static_cast<Py_ssize_t>(model.layers.size()) + 4 < reader.size()) {
        PyObject* item = reader.object();
        if (!item) break;
        Reader layer(item);
        const void* weight = layer.address();
        const void* bias = layer.address();
        const int64_t out = layer.integer();
        model.layers.push_back({weight, bias, out, layer.integer()});
    }
    return model;
}

Tableau read_tableau(PyObject* tuple) {
    Reader reader(tuple);
    Tableau tableau;
    tableau.n_stages = static_cast<int>(reader.integer());
    tableau.n_extended = static_cast<int>(reader.integer());
    tableau.degree = static_cast<int>(reader.integer());
    tableau.n_estimates = static_cast<int>(reader.integer());
    tableau.a = reader.numbers();
    tableau.c = reader.numbers();
    tableau.error = reader.numbers();
    tableau.dense = reader.numbers();
    return tableau;
}

Control read_control(PyObject* tuple) {
    Reader reader(tuple);
    Control control;
    double* numbers[] = {&control.rtol,        &control.atol,       &control.first_step,
                         &control.min_step,    &control.step_size,  &control.error_order,
                         &control.pcoeff,      &control.icoeff,     &control.dcoeff,
                         &control.safety,      &control.factor_min, &control.factor_max};
    for (double* number : numbers) *number = reader.number();
    control.n_history = static_cast<int>(reader.integer());
    control.max_steps = reader.integer();
    control.grid = reader.numbers();
    return control;
}

// Whether a signal handler, such as that of Ctrl-C, raised an exception.
bool interrupted() {
    const PyGILState_STATE state = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return raised;
}

// Run without the interpreter's lock; return whether it worked, with an exception set
// if it did not.
template <class Work>
bool run_unlocked(const Work& work) {
    PyThreadState* state = PyEval_SaveThread();
    PyObject* type = nullptr;
    std::string message;
    bool stopped = false;
    try {
        work();
    } catch (const Interrupted&) {
        stopped = true;  // the exception is set already
    } catch (const std::bad_alloc&) {
        type = PyExc_MemoryError, message = "not enough memory for the solve";
    } catch (const std::length_error&) {
        type = PyExc_MemoryError, message = "the solve is too large";
    } catch (const std::exception& error) {
        type = PyExc_RuntimeError, message = error.what();
    }
    PyEval_RestoreThread(state);
    if (type) PyErr_SetString(type, message.c_str());
    return !type && !stopped;
}

constexpr const char* RECORDING = "sknode.ode.kernels.Recording";

Recording* read_recording(PyObject* capsule) {
    return capsule ? static_cast<Recording*>(PyCapsule_GetPointer(capsule, RECORDING)) : nullptr;
}

void destroy_recording(PyObject* capsule) { delete read_recording(capsule); }

// The solvers of an instruction set; check for an error afterwards.
Solvers find_solvers(int64_t set) {
    const auto sets = instruction_sets();
    if (set >= 0 && set < static_cast<int64_t>(sets.size()) && sets[set].available)
        return sets[set].solvers;
    PyErr_SetString(PyExc_ValueError, "instruction set not available");
    return {};
}

// What the solves forwards and backwards have in common.
struct Arguments {
    Problem problem;
    Solvers solvers;
    bool is_double;

    // Reads the arguments up to those on threads; check for an error afterwards.
    explicit Arguments(Reader& reader) {
        const int64_t set = reader.integer();
        is_double = reader.integer() != 0;
        PyObject *model = reader.object(), *tableau = reader.object();
        PyObject* control = reader.object();
        if (PyErr_Occurred()) return;
        Problem& p = problem;
        p.model = read_model(model);
        p.tableau = read_tableau(tableau);
        p.control = read_control(control);
        p.batch = reader.integer(), p.n_times = reader.integer();
        p.times_stride = reader.integer();
        p.times = static_cast<const double*>(reader.address());
        p.y0 = reader.address(), p.y = reader.address();
        int64_t* counts = static_cast<int64_t*>(reader.address());
        p.status = counts, p.n_steps = counts + p.batch;
        p.n_accepted = counts + 2 * p.batch, p.n_rejected = counts + 3 * p.batch;
        p.n_evaluations = counts + 4 * p.batch, p.next_output = counts + 5 * p.batch;
        p.n_dense = p.n_evaluations;  // until they are counted
        p.t_reached = static_cast<double*>(reader.address());
        p.record = reader.integer() != 0;
        p.threads = static_cast<int>(reader.integer());
        p.worth_threads = reader.integer() != 0;
        p.interrupted = interrupted;
        if (PyErr_Occurred()) return;
        solvers = find_solvers(set);
    }

    // After the solve: count accepted steps and evaluations.
    void finish_counts() const {
        const Problem& p = problem;
        const Tableau& rk = p.tableau;
        const bool chosen = !(p.control.step_size > 0) && !(p.control.first_step > 0);
        for (int64_t i = 0; i < p.batch; ++i) {
            const double* times = p.times + i * p.times_stride;
            const bool moving = times[p.n_times - 1] != times[0];
            p.n_accepted[i] = p.n_steps[i] - p.n_rejected[i];
            p.n_evaluations[i] = p.n_dense[i] * (rk.n_extended - rk.n_stages) +
                                 p.n_steps[i] * (rk.n_stages - 1) + (moving ? 1 + chosen : 0);
        }
    }
};

std::vector<LayerGradient> read_layer_gradients(PyObject* layers) {
    std::vector<LayerGradient> found;
    Reader items(layers);
    while (!PyErr_Occurred() && static_cast<Py_ssize_t>(found.size()) < items.size()) {
        PyObject* item = items.object();
        if (!item) break;
        Reader layer(item);
        void* weight = layer.address();
        found.push_back({weight, layer.address()});
    }
    return found;
}

PyObject* solve(PyObject*, PyObject* args) {
    Reader reader(args);
    const Arguments given(reader);
    if (PyErr_Occurred()) return nullptr;
    const Solvers& solvers = given.solvers;
    const Solver solver = given.is_double ? solvers.in_double : solvers.in_float;
    std::unique_ptr<Recording> recording;
    if (!run_unlocked([&] { recording = solver(given.problem); })) return nullptr;
    given.finish_counts();
    if (!recording) Py_RETURN_NONE;
    PyObject* capsule = PyCapsule_New(recording.get(), RECORDING, destroy_recording);
    if (capsule) recording.release();
    return capsule;
}

PyObject* reverse(PyObject*, PyObject* args) {
    Reader reader(args);
    const Recording* recording = read_recording(reader.object());
    ReverseProblem p;
    p.grad = reader.address();
    p.grad_y0 = reader.address();
    PyObject* layers = reader.object();
    p.threads = static_cast<int>(reader.integer());
    p.interrupted = interrupted;
    if (PyErr_Occurred()) return nullptr;
    p.layers = read_layer_gradients(layers);
    if (PyErr_Occurred() || !run_unlocked([&] { recording->reverse(p); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* adjoint(PyObject*, PyObject* args) {
    Reader reader(args);
    const Arguments given(reader);
    if (PyErr_Occurred()) return nullptr;
    AdjointProblem p;
    p.solve = given.problem;
    p.grad = reader.address();
    p.last = static_cast<const double*>(reader.address());
    p.scale = static_cast<const double*>(reader.address());
    p.grad_y = reader.address();
    PyObject* layers = reader.object();
    if (PyErr_Occurred()) return nullptr;
    p.layers = read_layer_gradients(layers);
    const Solvers& solvers = given.solvers;
    const AdjointSolver solver =
        given.is_double ? solvers.adjoint_in_double : solvers.adjoint_in_float;
    if (PyErr_Occurred() || !run_unlocked([&] { solver(p); })) return nullptr;
    given.finish_counts();
    Py_RETURN_NONE;
}

Recurrence read_recurrence(Reader& reader) {
    Recurrence p;
    for (const void*& parameter : p.parameters) parameter = reader.address();
    p.n_inputs = reader.integer(), p.size = reader.integer();
    p.batch = reader.integer(), p.length = reader.integer();
    p.inputs = reader.address();
    p.lengths = static_cast<const int64_t*>(reader.address());
    p.states = reader.address(), p.last = reader.address();
    p.threads = static_cast<int>(reader.integer());
    p.interrupted = interrupted;
    return p;
}

// Runs a kernel that leaves nothing behind but what it wrote, by an instruction set.
template <class Kind>
PyObject* run_kernel(int64_t set, bool is_double, void (*Solvers::*in_float)(const Kind&),
                     void (*Solvers::*in_double)(const Kind&), const Kind& problem) {
    const Solvers solvers = find_solvers(set);
    const auto run = is_double ? solvers.*in_double : solvers.*in_float;
    if (PyErr_Occurred() || !run_unlocked([&] { run(problem); })) return nullptr;
    Py_RETURN_NONE;
}

PyObject* recur(PyObject*, PyObject* args) {
    Reader reader(args);
    const int64_t set = reader.integer();
    const bool is_double = reader.integer() != 0;
    const Recurrence p = read_recurrence(reader);
    if (PyErr_Occurred()) return nullptr;
    return run_kernel(set, is_double, &Solvers::recur_in_float, &Solvers::recur_in_double, p);
}

PyObject* recur_back(PyObject*, PyObject* args) {
    Reader reader(args);
    const int64_t set = reader.integer();
    const bool is_double = reader.integer() != 0;
    RecurrenceReverse p;
    p.forward = read_recurrence(reader);
    p.grad = reader.address();
    for (void*& gradient : p.gradients) gradient = reader.address();
    if (PyErr_Occurred()) return nullptr;
    return run_kernel(set, is_double, &Solvers::recur_back_in_float,
                      &Solvers::recur_back_in_double, p);
}

Evaluation read_evaluation(Reader& reader) {
    Evaluation p;
    PyObject* model = reader.object();
    if (!model) return p;
    p.model = read_model(model);
    p.rows = reader.integer();
    p.x = reader.address(), p.out = reader.address();
    p.threads = static_cast<int>(reader.integer());
    p.interrupted = interrupted;
    return p;
}

PyObject* evaluate(PyObject*, PyObject* args) {
    Reader reader(args);
    const int64_t set = reader.integer();
    const bool is_double = reader.integer() != 0;
    const Evaluation p = read_evaluation(reader);
    if (PyErr_Occurred()) return nullptr;
    return run_kernel(set, is_double, &Solvers::evaluate_in_float,
                      &Solvers::evaluate_in_double, p);
}

PyObject* evaluate_back(PyObject*, PyObject* args) {
    Reader reader(args);
    const int64_t set = reader.integer();
    const bool is_double = reader.integer() != 0;
    EvaluationReverse p;
    p.forward = read_evaluation(reader);
    p.grad = reader.address(), p.grad_x = reader.address();
    PyObject* layers = reader.object();
    if (PyErr_Occurred()) return nullptr;
    p.layers = read_layer_gradients(layers);
    if (PyErr_Occurred()) return nullptr;
    return run_kernel(set, is_double, &Solvers::evaluate_back_in_float,
                      &Solvers::evaluate_back_in_double, p);
}

PyObject* recorded_bytes(PyObject*, PyObject* capsule) {
    const Recording* recording = read_recording(capsule);
    return recording ? PyLong_FromLongLong(recording->bytes()) : nullptr;
}

PyObject* list_instruction_sets(PyObject*, PyObject*) {
    const auto sets = instruction_sets();
    PyObject* result = PyTuple_New(static_cast<Py_ssize_t>(sets.size()));
    if (!result) return nullptr;
    for (size_t i = 0; i < sets.size(); ++i) {
        PyObject* item = Py_BuildValue("(sO)", sets[i].name,
                                       sets[i].available ? Py_True : Py_False);
        if (!item || PyTuple_SetItem(result, static_cast<Py_ssize_t>(i), item) < 0) {
            Py_DECREF(result);
            return nullptr;
        }
    }
    return result;
}

PyObject* share(PyObject*, PyObject* on) {
    const int truth = PyObject_IsTrue(on);
    return truth < 0 ? nullptr : PyBool_FromLong(share_threads(truth));
}

PyMethodDef methods[] = {
    {"solve", solve, METH_VARARGS, "Solve a batch; return its recording or None."},
    {"reverse", reverse, METH_VARARGS, "Go back over the steps of a recording."},
    {"adjoint", adjoint, METH_VARARGS, "Solve states and cotangents backwards."},
    {"recur", recur, METH_VARARGS, "Read series with a recurrent unit."},
    {"recur_back", recur_back, METH_VARARGS, "Go back over what it read."},
    {"evaluate", evaluate, METH_VARARGS, "Evaluate a perceptron at rows."},
    {"evaluate_back", evaluate_back, METH_VARARGS, "Go back over an evaluation."},
    {"recorded_bytes", recorded_bytes, METH_O, "The memory that recorded steps take."},
    {"share_threads", share, METH_O, "Use torch's threads or not; return whether they are."},
    {"instruction_sets", list_instruction_sets, METH_NOARGS,
     "List (name, available), the fastest first."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Fused kernels.", 0, methods, nullptr, nullptr, nullptr,
    nullptr,
};

}  // namespace
}  // namespace sknode

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&sknode::definition); }
