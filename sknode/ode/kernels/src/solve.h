// A solve of one tile of samples and the reverse of its steps. The numbers are those of
// integrate.py and gradients.py, which say why; here only how.

// An accepted step of every lane, its own one each.
template <class T>
struct Step {
    T* y;              // (dim, LANES), at the start
    double *t, *t1;    // (LANES,), ascending
    int64_t* outputs;  // (LANES,), the first output time of the step
};

// The accepted steps of a tile, every lane's own ones one after another. They lie in
// pages that are never moved, so that many steps take no more memory than they need.
template <class T>
class TileRecord {
public:
    int64_t counts[LANES<T>] = {};
    int64_t size = 0;                     // steps in use: the largest count
    int64_t first_held[LANES<T>] = {};    // output times from here hold the last state
    int64_t first_output[LANES<T>] = {};  // those before here hold the first

    Step<T> operator[](int64_t i) const {
        const Step<T>& page = pages_[i / PAGE];
        const int64_t at = i % PAGE * LANES<T>;
        return {page.y + at * dim_, page.t + at, page.t1 + at, page.outputs + at};
    }

    void add(const bool* moved, const T* state, int64_t dim, const double* start,
             const double* end, const int64_t* output) {
        dim_ = dim;
        for (int l = 0; l < LANES<T>; ++l) {
            if (!moved[l]) continue;
            const int64_t i = counts[l]++;
            if (i == size && size++ % PAGE == 0) add_page();
            const Step<T> step = (*this)[i];
            for (int64_t j = 0; j < dim; ++j)
                step.y[j * LANES<T> + l] = state[j * LANES<T> + l];
            step.t[l] = start[l], step.t1[l] = end[l], step.outputs[l] = output[l];
        }
    }

    int64_t bytes() const { return states_.bytes() + times_.bytes() + outputs_.bytes(); }

private:
    static constexpr int64_t PAGE = 8;
    int64_t dim_ = 0;
    std::vector<Step<T>> pages_;
    Arena<T> states_;
    Arena<double> times_;
    Arena<int64_t> outputs_;

    void add_page() {
        constexpr int64_t n = PAGE * LANES<T>;
        double* t = times_.take(2 * n);
        pages_.push_back({states_.take(n * dim_), t, t + n, outputs_.take(n)});
    }
};

// The times of a sample, made to ascend.
struct Times {
    const double* values;
    double sign;
    int64_t n;

    Times(const Problem& p, int64_t sample)
        : values(p.times + sample * p.times_stride), n(p.n_times) {
        sign = values[n - 1] < values[0] ? -1.0 : 1.0;
    }
    double operator[](int64_t i) const { return values[i] * sign; }
};

// `E` evaluates a kind of network on a tile.
template <class E>
class TileSolver final : TileStepper<typename E::Value> {
    using T = typename E::Value;
    using Base = TileStepper<T>;
    using Base::arena_, Base::rk_, Base::rows_, Base::size_;
    using Base::y_, Base::k_, Base::state_, Base::moved_, Base::started_;
    using Base::t_, Base::t1_, Base::t_end_, Base::length_, Base::sign_;
    using Base::combine, Base::evaluate_stage;

public:
    TileSolver(const Problem& problem, const typename E::Net& network,
               const Coefficients<T>& rk, Watch& watch)
        : Base(problem.control, rk, watch, network.dim), p_(problem), net_(network),
          evaluator_(network, 1, false) {
        polynomial_ = arena_.take(size_ * std::max(rk.degree, 1));
    }

    // Solve the samples from `first` on; record their steps on request.
    void solve(int64_t first, TileRecord<T>* record) {
        first_ = first;
        n_ = static_cast<int>(std::min<int64_t>(LANES<T>, p_.batch - first));
        start();
        this->run([&] { step(record); });
        finish(record);
    }

private:
    const Problem& p_;
    const typename E::Net& net_;
    E evaluator_;
    T* polynomial_;
    int64_t first_ = 0;
    int n_ = 0;
    int64_t n_dense_[LANES<T>], output_[LANES<T>], first_output_[LANES<T>];

    T* output(int lane, int64_t column) const {
        return static_cast<T*>(p_.y) + ((first_ + lane) * p_.n_times + column) * rows_;
    }

    const T* initial(int lane) const {
        return static_cast<const T*>(p_.y0) + (first_ + lane) * rows_;
    }

    // Output times from `column` on hold the last state: of a lane that never moved,
    // the first, whatever it is.
    void hold(int lane, int64_t column) const {
        for (; column < p_.n_times; ++column) {
            T* to = output(lane, column);
            for (int64_t i = 0; i < rows_; ++i)
                to[i] = started_[lane] ? y_[i * LANES<T> + lane] : initial(lane)[i];
        }
    }

    void evaluate(int, T* state, const double* times, T* slope) override {
        if (net_.uses_time)
            for (int l = 0; l < LANES<T>; ++l)
                state[size_ + l] = static_cast<T>(times[l] * sign_[l]);
        evaluator_.evaluate(state, slope);
    }

    void start() {
        for (int l = 0; l < LANES<T>; ++l) {
            const Times times(p_, first_ + (l < n_ ? l : 0));
            sign_[l] = times.sign;
            t_[l] = times[0], t_end_[l] = l < n_ ? times[times.n - 1] : times[0];
            n_dense_[l] = 0;
            int64_t at_start = 0;
            while (at_start < times.n && times[at_start] == times[0]) ++at_start;
            output_[l] = std::min(at_start, times.n - 1);
            first_output_[l] = at_start;
            for (int64_t i = 0; i < rows_; ++i)
                y_[i * LANES<T> + l] = l < n_ ? initial(l)[i] : T(0);
            for (int64_t c = 0; l < n_ && c < at_start; ++c)
                std::memcpy(output(l, c), initial(l), rows_ * sizeof(T));
        }
        this->begin();
        aim_at_grid();
    }

    // Steps on a grid, the same for all samples, end there and nowhere else.
    void aim_at_grid() {
        const std::vector<double>& grid = p_.control.grid;
        if (grid.empty()) return;
        for (int l = 0; l < LANES<T>; ++l)
            if (this->running_[l]) this->aim(l, grid[this->n_steps_[l] + 1] * sign_[l]);
    }

    void step(TileRecord<T>* record) {
        double ratio[LANES<T>];
        this->attempt(ratio);
        int64_t before[LANES<T>];
        std::copy(output_, output_ + LANES<T>, before);
        if (p_.n_times > 2) write_outputs();
        if (record) record->add(moved_, y_, rows_, t_, t1_, before);
        this->conclude(ratio);
        aim_at_grid();
    }

    // Evaluate the dense output where output times fell into a step.
    void write_outputs() {
        bool any = false;
        for (int l = 0; l < n_; ++l)
            if (moved_[l] && output_[l] < p_.n_times - 1)
                any = any || Times(p_, first_ + l)[output_[l]] <= t1_[l];
        if (!any) return;
        for (int i = rk_.n_stages; i < rk_.n_extended; ++i) {
            combine(i, state_);
            evaluate_stage(i, state_, slope_extra());
        }
        for (int m = 0; m < rk_.degree; ++m)
            for (int64_t at = 0; at < size_; at += width<T>) {
                Vec<T> sum{};
                for (int j = 0; j < rk_.n_extended; ++j)
                    sum += load(k_ + j * size_ + at) * rk_.dense[j * rk_.degree + m];
                store(polynomial_ + m * size_ + at, sum);
            }
        for (int l = 0; l < n_; ++l) {
            if (!moved_[l]) continue;
            const Times times(p_, first_ + l);
            const int64_t before = output_[l];
            for (; output_[l] < p_.n_times - 1; ++output_[l]) {
                const double at = times[output_[l]];
                if (!(at <= t1_[l])) break;
                const double theta = (at - t_[l]) / length_[l];
                const T x = static_cast<T>(std::min(std::max(theta, 0.0), 1.0));
                T* to = output(l, output_[l]);
                for (int64_t i = 0; i < rows_; ++i) {
                    const T* coefficient = polynomial_ + i * LANES<T> + l;
                    T value = coefficient[(rk_.degree - 1) * size_];
                    for (int m = rk_.degree - 2; m >= 0; --m)
                        value = value * x + coefficient[m * size_];
                    to[i] = y_[i * LANES<T> + l] + value * x;
                }
            }
            n_dense_[l] += output_[l] > before;
        }
    }

    // The slope at the end of the step is still needed: a further one goes elsewhere.
    T* slope_extra() {
        if (!extra_) extra_ = arena_.take(size_);
        return extra_;
    }
    T* extra_ = nullptr;

    void finish(TileRecord<T>* record) {
        for (int l = 0; l < n_; ++l) {
            const int64_t sample = first_ + l;
            hold(l, std::max(output_[l], first_output_[l]));
            p_.status[sample] = this->status_[l];
            p_.n_steps[sample] = this->n_steps_[l];
            p_.n_rejected[sample] = this->n_rejected_[l];
            p_.n_dense[sample] = n_dense_[l];
            p_.next_output[sample] = output_[l];
            p_.t_reached[sample] = t_[l] * sign_[l];
            if (record) {
                record->first_held[l] = std::max(output_[l], first_output_[l]);
                record->first_output[l] = first_output_[l];
            }
        }
    }
};

template <class E>
class TileReverse {
    using T = typename E::Value;

public:
    TileReverse(const Problem& problem, const typename E::Net& network,
                const Coefficients<T>& rk, const ReverseProblem& reverse, Watch& watch)
        : p_(problem), net_(network), rk_(rk), watch_(watch),
          grad_(static_cast<const T*>(reverse.grad)), grad_y0_(static_cast<T*>(reverse.grad_y0)), dim_(network.dim),
          size_(network.dim * LANES<T>), wide_(network.inputs * LANES<T>),
          evaluator_(network, rk.n_extended, true) {
        const int n = rk.n_extended;
        k_ = arena_.take(size_ * n), states_ = arena_.take(wide_ * n);
        kappa_ = arena_.take(size_ * n), back_ = arena_.take(size_ * n);
        lam_ = arena_.take(size_), h_ = arena_.take(LANES<T>);
        moments_ = arena_.take(size_ * (rk.degree + 1));
        b_.assign(n, T(0));
        for (int i = 0; i < rk.n_stages - 1; ++i) b_[i] = rk.row(rk.n_stages - 1)[i];
    }

    void reverse(int64_t first, const TileRecord<T>& record, std::vector<LayerSum<T>>& sums) {
        first_ = first;
        n_ = static_cast<int>(std::min<int64_t>(LANES<T>, p_.batch - first));
        for (int l = 0; l < LANES<T>; ++l)
            sign_[l] = Times(p_, first + (l < n_ ? l : 0)).sign;
        std::fill(lam_, lam_ + size_, T(0));
        for (int l = 0; l < n_; ++l)
            for (int64_t c = record.first_held[l]; c < p_.n_times; ++c)
                add_cotangent(l, c);
        for (int64_t i = record.size - 1; i >= 0; --i) {
            watch_.look();
            step(record, i, sums);
        }
        for (int l = 0; l < n_; ++l) {
            for (int64_t c = 0; c < record.first_output[l]; ++c) add_cotangent(l, c);
            for (int64_t i = 0; i < dim_; ++i)
                grad_y0_[(first + l) * dim_ + i] = lam_[i * LANES<T> + l];
        }
    }

private:
    const Problem& p_;
    const typename E::Net& net_;
    const Coefficients<T>& rk_;
    Watch& watch_;
    const T* grad_;
    T* grad_y0_;
    const int64_t dim_, size_, wide_;
    E evaluator_;
    Arena<T> arena_;
    T *k_, *states_, *kappa_, *back_, *lam_, *h_, *moments_;
    std::vector<T> b_;
    int64_t first_ = 0;
    int n_ = 0;
    double sign_[LANES<T>];

    const T* cotangent(int lane, int64_t column) const {
        return grad_ + ((first_ + lane) * p_.n_times + column) * dim_;
    }

    void add_cotangent(int lane, int64_t column) {
        const T* g = cotangent(lane, column);
        for (int64_t i = 0; i < dim_; ++i) lam_[i * LANES<T> + lane] += g[i];
    }

    void step(const TileRecord<T>& record, int64_t slot, std::vector<LayerSum<T>>& sums) {
        constexpr int W = width<T>;
        const auto [y, t, t1, outputs] = record[slot];
        for (int l = 0; l < LANES<T>; ++l)
            h_[l] = static_cast<T>((t1[l] - t[l]) * sign_[l]);
        const bool dense = gather_outputs(record, slot, t, t1, outputs);
        const int n = dense ? rk_.n_extended : rk_.n_stages - 1;

        for (int i = 0; i < n; ++i) {
            T* state = states_ + i * wide_;
            const T* a = rk_.row(i);
            for (int64_t at = 0; at < size_; at += W) {
                Vec<T> sum = load(y + at);
                for (int j = 0; j < i; ++j) sum += load(k_ + j * size_ + at) * a[j];
                store(state + at, sum);
            }
            if (net_.uses_time)
                for (int l = 0; l < LANES<T>; ++l)
                    state[dim_ * LANES<T> + l] =
                        static_cast<T>(stage_time(rk_.c[i], t[l], t1[l]) * sign_[l]);
            T* k = k_ + i * size_;
            evaluator_.linearize(i, state, k);
            for (int64_t at = 0; at < size_; at += W)
                store(k + at, load(k + at) * load(h_ + at % LANES<T>));
        }

        for (int i = n - 1; i >= 0; --i) {
            T* kappa = kappa_ + i * size_;
            for (int64_t at = 0; at < size_; at += W) {
                Vec<T> sum = load(lam_ + at) * b_[i];
                for (int j = n - 1; j > i; --j)
                    sum += load(back_ + j * size_ + at) * rk_.row(j)[i];
                if (dense)
                    for (int m = 0; m < rk_.degree; ++m)
                        sum += load(moments_ + (m + 1) * size_ + at) *
                               rk_.dense[i * rk_.degree + m];
                store(kappa + at, sum * load(h_ + at % LANES<T>));
            }
            evaluator_.pullback(i, kappa, back_ + i * size_);
        }
        evaluator_.accumulate(sums, states_, kappa_, n);
        for (int64_t at = 0; at < size_; at += W) {
            Vec<T> sum = load(lam_ + at);
            for (int i = n - 1; i >= 0; --i) sum += load(back_ + i * size_ + at);
            if (dense) sum += load(moments_ + at);
            store(lam_ + at, sum);
        }
    }

    // The cotangents of a step's outputs, by the power of their place in it.
    bool gather_outputs(const TileRecord<T>& record, int64_t slot, const double* t,
                        const double* t1, const int64_t* outputs) {
        if (p_.n_times <= 2) return false;
        bool any = false;
        for (int l = 0; l < n_; ++l) {
            if (slot >= record.counts[l]) continue;
            const int64_t from = outputs[l];
            const int64_t to = slot + 1 < record.counts[l] ? record[slot + 1].outputs[l]
                                                           : record.first_held[l];
            if (from == to) continue;
            if (!any) std::fill(moments_, moments_ + size_ * (rk_.degree + 1), T(0));
            any = true;
            const Times times(p_, first_ + l);
            for (int64_t c = from; c < to; ++c) {
                const double theta = (times[c] - t[l]) / (t1[l] - t[l]);
                const T x = static_cast<T>(std::min(std::max(theta, 0.0), 1.0));
                const T* g = cotangent(l, c);
                T power = 1;
                for (int m = 0; m <= rk_.degree; ++m, power *= x) {
                    T* to_moment = moments_ + m * size_ + l;
                    for (int64_t i = 0; i < dim_; ++i) to_moment[i * LANES<T>] += power * g[i];
                }
            }
        }
        return any;
    }
};

// Run `count` jobs on some threads; which thread has which does not matter to them.
// Threads live for one call: nothing waits in between, and a fork finds none. What one
// throws ends all and is thrown on.
template <class Worker>
static void run_jobs(int64_t count, int threads, const Worker& worker) {
    std::atomic<int64_t> next{0};
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr failure;
    const auto work = [&] {
        try {
            worker(next);
        } catch (...) {
            next = count;
            if (!failed.test_and_set()) failure = std::current_exception();
        }
    };
    threads = static_cast<int>(std::min<int64_t>(threads, count));
    std::vector<std::thread> others;
    others.reserve(std::max(threads - 1, 0));
    for (int i = 1; i < threads; ++i) {
        try {
            others.emplace_back(work);
        } catch (const std::exception&) {
            break;  // fewer threads then
        }
    }
    work();
    for (std::thread& thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);
}

// The parameters' gradients, summed up over tiles. A chunk of them is summed up by one
// thread, chunks are summed up in their order: the result is the same for any number of
// threads.
template <class Net>
class TileSums {
    using T = typename Net::Value;

public:
    TileSums(const Net& network, int64_t tiles) : net_(network), tiles_(tiles) {
        const int64_t size = network.parameters() * static_cast<int64_t>(sizeof(T));
        const int64_t most = std::max<int64_t>(CHUNK_BYTES / size, 1);
        const int64_t chunks = std::min({tiles, int64_t{16}, most});
        arenas_.resize(chunks), sums_.resize(chunks);
    }

    int64_t chunks() const { return static_cast<int64_t>(sums_.size()); }

    // Call `tile(index, sums)` for the tiles of a chunk.
    template <class Tile>
    void fill(int64_t c, const Tile& tile) {
        for (size_t l = 0; l < net_.depth(); ++l)
            sums_[c].emplace_back(net_.out(l), net_.in(l), arenas_[c]);
        const int64_t end = tiles_ * (c + 1) / chunks();
        for (int64_t i = tiles_ * c / chunks(); i < end; ++i) tile(i, sums_[c]);
        for (LayerSum<T>& sum : sums_[c]) sum.finish();
    }

    const std::vector<LayerSum<T>>& total() {
        for (int64_t c = 1; c < chunks(); ++c)
            for (size_t l = 0; l < net_.depth(); ++l) {
                LayerSum<T>&to = sums_[0][l], &from = sums_[c][l];
                for (int64_t i = 0; i < to.rows * to.stride; ++i) to.weight[i] += from.weight[i];
                for (int64_t i = 0; i < to.rows; ++i) to.bias[i] += from.bias[i];
            }
        return sums_[0];
    }

private:
    // all chunks together sum up in no more memory than this, if there are several
    static constexpr int64_t CHUNK_BYTES = int64_t{1} << 27;

    const Net& net_;
    int64_t tiles_;
    std::vector<Arena<T>> arenas_;
    std::vector<std::vector<LayerSum<T>>> sums_;
};

template <class E>
class TiledRecording final : public Recording {
    using T = typename E::Value;

public:
    explicit TiledRecording(const Problem& problem)
        : p_(problem), net_(problem.model), rk_(problem.tableau),
          tiles_((problem.batch + LANES<T> - 1) / LANES<T>) {
        if (problem.record) records_.resize(tiles_);
        Watch watch(problem.interrupted);
        run_jobs(tiles_, problem.threads, [&](std::atomic<int64_t>& next) {
            TileSolver<E> solver(p_, net_, rk_, watch);
            for (int64_t i = next++; i < tiles_; i = next++)
                solver.solve(i * LANES<T>, problem.record ? &records_[i] : nullptr);
        });
    }

    void reverse(const ReverseProblem& problem) const override {
        TileSums<typename E::Net> sums(net_, tiles_);
        Watch watch(problem.interrupted);
        run_jobs(sums.chunks(), problem.threads, [&](std::atomic<int64_t>& next) {
            TileReverse<E> tile(p_, net_, rk_, problem, watch);
            for (int64_t c = next++; c < sums.chunks(); c = next++)
                sums.fill(c, [&](int64_t i, std::vector<LayerSum<T>>& sum) {
                    tile.reverse(i * LANES<T>, records_[i], sum);
                });
        });
        net_.unfold(sums.total(), problem.layers);
    }

    int64_t bytes() const override {
        int64_t total = 0;
        for (const TileRecord<T>& record : records_) total += record.bytes();
        return total;
    }

private:
    Problem p_;
    typename E::Net net_;
    Coefficients<T> rk_;
    int64_t tiles_;
    std::vector<TileRecord<T>> records_;
};

template <class E>
static std::unique_ptr<Recording> solve_with(const Problem& problem) {
    auto recording = std::make_unique<TiledRecording<E>>(problem);
    if (!problem.record) return nullptr;
    return recording;
}

template <class T>
static std::unique_ptr<Recording> solve(const Problem& problem) {
    if (problem.model.flow.exists) return solve_with<FlowEvaluator<T>>(problem);
    return with_activation(problem.model.activation, [&](auto activation) {
        return solve_with<Evaluator<decltype(activation)::value, T>>(problem);
    });
}
