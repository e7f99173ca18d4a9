// The continuous adjoint of a tile: states and cotangents are solved backwards in time,
// set to what is known at output times; the parameters' gradients are a quadrature over
// the stages of accepted steps. The numbers are those of continuous.py, which says why.

// Where the evaluations of a step are kept: [one end][inner stages of the
// quadrature][other end][other stages]. The last stage of a step is the first of the
// next, so that the ends swap; the stages that count are neighbours either way.
struct Slots {
    std::vector<int> inner;  // of stages 1 to n - 2
    std::vector<double> weights;
    int used = 1;  // the first stage and the inner ones that count
    int n_stages;
    bool swapped = false;

    template <class T>
    explicit Slots(const Coefficients<T>& rk)
        : inner(rk.n_stages, 0), weights(rk.n_stages, 0.0), n_stages(rk.n_stages) {
        const T* b = rk.row(n_stages - 1);
        weights[0] = b[0];
        for (int i = 1; i < n_stages - 1; ++i)
            if (b[i] != 0) weights[used] = b[i], inner[i] = used++;
        int next = used + 1;
        for (int i = 1; i < n_stages - 1; ++i)
            if (b[i] == 0) inner[i] = next++;
    }

    int first() const { return swapped ? used : 0; }
    int last() const { return swapped ? 0 : used; }
    int operator[](int stage) const {
        return stage == 0 ? first() : stage == n_stages - 1 ? last() : inner[stage];
    }
    // The range of `used` slots that count, and the weight of each.
    int begin() const { return swapped ? 1 : 0; }
    double weight(int slot) const { return slot == first() ? weights[0] : weights[slot]; }
};

template <Activation A, class T>
class TileAdjoint final : TileStepper<T> {
    using Base = TileStepper<T>;
    using Base::arena_, Base::size_, Base::lanes_, Base::running_, Base::moved_;
    using Base::y_, Base::slope_, Base::state_;
    using Base::t_, Base::t_end_, Base::length_, Base::sign_;

public:
    TileAdjoint(const AdjointProblem& problem, const Network<T>& network,
                const Coefficients<T>& rk, Watch& watch)
        : Base(problem.solve.control, rk, watch, 2 * network.dim, network.uses_time),
          a_(problem), p_(problem.solve), net_(network), dim_(network.dim), half_(dim_ * LANES<T>),
          wide_(network.inputs * LANES<T>), slots_(rk),
          evaluator_(network, rk.n_stages, true) {
        inputs_ = arena_.take(wide_ * rk.n_stages);
        cotangents_ = arena_.take(half_ * rk.n_stages);
        weights_ = arena_.take(LANES<T> * rk.n_stages);
    }

    void solve(int64_t first, std::vector<LayerSum<T>>& sums) {
        first_ = first;
        n_ = static_cast<int>(std::min<int64_t>(LANES<T>, p_.batch - first));
        lanes_ = Evaluator<A, T>::lanes_for(n_);
        if (!start()) return;
        this->run([&] { step(sums); });
        finish();
    }

private:
    const AdjointProblem& a_;
    const Problem& p_;
    const Network<T>& net_;
    const int64_t dim_, half_, wide_;
    Slots slots_;
    Evaluator<A, T> evaluator_;
    T *inputs_, *cotangents_, *weights_;
    int64_t first_ = 0;
    int n_ = 0;
    double scale_[LANES<T>];
    T inverse_[LANES<T>];
    int64_t column_[LANES<T>], lowest_[LANES<T>];  // the next inner output, and the last

    bool active(int lane) const { return lane < n_ && a_.scale[first_ + lane] > 0; }
    const T* output(int lane, int64_t column) const {
        return static_cast<const T*>(p_.y) +
               ((first_ + lane) * p_.n_times + column) * dim_;
    }

    // The slopes of states and cotangents; keep the evaluation in the stage's slot.
    void evaluate(int stage, T* state, const double* times, T* slope) override {
        const int slot = slots_[stage];
        T *input = inputs_ + slot * wide_, *minus_a = cotangents_ + slot * half_;
        std::memcpy(input, state, half_ * sizeof(T));
        if (this->uses_time_)
            for (int l = 0; l < lanes_; ++l)
                input[half_ + l] = static_cast<T>(times[l] * sign_[l]);
        for (int64_t i = 0; i < half_; i += width<T>) store(minus_a + i, -load(state + half_ + i));
        evaluator_.linearize(slot, input, slope, lanes_);
        evaluator_.pullback(slot, minus_a, slope + half_, lanes_);
    }

    // Add the cotangent of an output.
    void add(int lane, int64_t column) {
        const T* g = static_cast<const T*>(a_.grad) +
                   ((first_ + lane) * p_.n_times + column) * dim_;
        for (int64_t i = 0; i < dim_; ++i)
            y_[half_ + i * LANES<T> + lane] += g[i] * inverse_[lane];
    }

    void set_state(int lane, int64_t column) {
        const T* y = output(lane, column);
        for (int64_t i = 0; i < dim_; ++i) y_[i * LANES<T> + lane] = y[i];
    }

    // Return whether there is anything to do.
    bool start() {
        int one = 0;
        while (one < n_ && !active(one)) ++one;
        if (one == n_) return false;
        std::fill(y_, y_ + size_, T(0));
        slots_.swapped = false;
        for (int lane = 0; lane < lanes_; ++lane) {
            // lanes that stay are a copy of one that does not: the field is defined there
            const bool goes = active(lane);
            const int l = goes ? lane : one;
            const Times times(p_, first_ + l);
            sign_[lane] = -times.sign;
            t_[lane] = -a_.last[first_ + l] * times.sign;
            t_end_[lane] = goes ? -times[0] : t_[lane];
            scale_[lane] = goes ? a_.scale[first_ + l] : 1.0;
            inverse_[lane] = static_cast<T>(1 / scale_[lane]);
            int64_t column = times.n - 1;
            const T* y = output(l, column);
            for (int64_t i = 0; i < dim_; ++i) y_[i * LANES<T> + lane] = y[i];
            lowest_[lane] = column_[lane] = 0;
            if (!goes) continue;
            for (; -times[column] <= t_[lane]; --column) add(lane, column);
            column_[lane] = column;
            while (times[lowest_[lane]] == times[0]) ++lowest_[lane];
        }
        this->begin();
        for (int l = 0; l < lanes_; ++l)
            if (running_[l] && column_[l] >= lowest_[l])
                this->aim(l, -Times(p_, first_ + l)[column_[l]],
                          1e-6 * std::max(p_.control.step_size, 0.0));
        return true;
    }

    void step(std::vector<LayerSum<T>>& sums) {
        alignas(64) double ratio[LANES<T>];
        this->attempt(ratio);
        bool any = false;
        for (int l = 0; l < lanes_; ++l) any = any || moved_[l];
        if (any) {
            add_up(ratio, sums);
            for (int l = 0; l < lanes_; ++l)
                if (running_[l] && !moved_[l]) keep_first(l);
            slots_.swapped = !slots_.swapped;
        }
        this->conclude(ratio);
        if (any && pass_outputs()) {
            std::memcpy(state_, y_, size_ * sizeof(T));
            evaluate(0, state_, t_, slope_);
        }
    }

    // A lane that stays keeps its first stage, in the slot of those that move on.
    void keep_first(int l) {
        const int from = slots_.first(), to = slots_.last();
        evaluator_.copy(from, to, l);
        for (int64_t i = l; i < wide_; i += LANES<T>)
            inputs_[to * wide_ + i] = inputs_[from * wide_ + i];
        for (int64_t i = l; i < half_; i += LANES<T>)
            cotangents_[to * half_ + i] = cotangents_[from * half_ + i];
    }

    // Add the parameters' gradients over the step.
    void add_up(const double* ratio, std::vector<LayerSum<T>>& sums) {
        const int from = slots_.begin(), n = slots_.used;
        for (int l = 0; l < lanes_; ++l) {
            const double factor = moved_[l] ? length_[l] * sign_[l] * scale_[l] : 0.0;
            for (int i = 0; i < n; ++i)
                weights_[i * LANES<T> + l] = static_cast<T>(slots_.weight(from + i) * factor);
            // weights of zero do not do away with what is not a number
            const bool constant = this->control_.step_size > 0;
            if (!moved_[l] && (constant || !std::isfinite(ratio[l]))) clear(l);
        }
        evaluator_.accumulate(sums, inputs_, cotangents_, from, n, weights_, lanes_);
    }

    // Make a lane's inner stages numbers again.
    void clear(int l) {
        for (int slot = slots_.begin(); slot < slots_.begin() + slots_.used; ++slot) {
            if (slot == slots_.first()) continue;
            evaluator_.clear(slot, l);
            for (int64_t i = l; i < wide_; i += LANES<T>) inputs_[slot * wide_ + i] = T(0);
            for (int64_t i = l; i < half_; i += LANES<T>)
                cotangents_[slot * half_ + i] = T(0);
        }
    }

    // Where lanes have reached outputs: add their cotangents, set back the states.
    bool pass_outputs() {
        bool jumped = false;
        for (int l = 0; l < n_; ++l) {
            if (!moved_[l] || column_[l] < lowest_[l]) continue;
            const Times times(p_, first_ + l);
            const int64_t before = column_[l];
            for (; column_[l] >= lowest_[l] && -times[column_[l]] <= t_[l]; --column_[l])
                add(l, column_[l]);
            if (column_[l] == before) continue;
            set_state(l, before);
            this->aim(l, column_[l] >= lowest_[l] ? -times[column_[l]] : t_end_[l]);
            jumped = true;
        }
        return jumped;
    }

    void finish() {
        for (int l = 0; l < n_; ++l) {
            if (!active(l)) continue;
            const int64_t sample = first_ + l;
            T* to = static_cast<T*>(a_.grad_y) + sample * dim_;
            for (int64_t i = 0; i < dim_; ++i)
                to[i] = static_cast<T>(y_[half_ + i * LANES<T> + l] * scale_[l]);
            p_.status[sample] = this->status_[l];
            p_.n_steps[sample] = this->n_steps_[l];
            p_.n_rejected[sample] = this->n_rejected_[l];
            p_.t_reached[sample] = t_[l] * sign_[l];
        }
    }
};

template <Activation A, class T>
static void adjoint_with(const AdjointProblem& problem) {
    const Problem& p = problem.solve;
    const Network<T> network(p.model);
    const Coefficients<T> rk(p.tableau);
    Watch watch(p.interrupted);
    const int64_t tiles = (p.batch + LANES<T> - 1) / LANES<T>;
    TileSums<Network<T>> sums(network, tiles);
    run_jobs(sums.chunks(), p.threads, [&](std::atomic<int64_t>& next) {
        TileAdjoint<A, T> tile(problem, network, rk, watch);
        for (int64_t c = next++; c < sums.chunks(); c = next++)
            sums.fill(c, [&](int64_t i, std::vector<LayerSum<T>>& sum) {
                tile.solve(i * LANES<T>, sum);
            });
    });
    network.unfold(sums.total(), problem.layers);
}

template <class T>
static void adjoint(const AdjointProblem& problem) {
    with_activation(problem.solve.model.activation, [&](auto activation) {
        adjoint_with<decltype(activation)::value, T>(problem);
    });
}
