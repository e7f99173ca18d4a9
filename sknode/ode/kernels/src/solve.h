// A solve of some samples on a tile and the reverse of their steps. The numbers are those
// of integrate.py and gradients.py, which say why; here only how.
//
// A sample takes as many steps as it needs. A lane whose sample is done goes on with the
// next one, so that few lanes are ever idle.

// An accepted step of every lane, its own one each.
template <class T>
struct Step {
    T* y;              // (dim, LANES), at the start
    double *t, *t1;    // (LANES,), ascending
    int64_t* outputs;  // (LANES,), the first output time of the step
};

// A sample in its lane.
struct Stay {
    int64_t sample;
    int lane;
    int64_t first, end;    // its steps are the lane's from `first` on, up to `end`
    int64_t first_output;  // output times before here hold the first state
    int64_t first_held;    // those from here hold the last one
};

// The accepted steps of a tile, every lane's own ones one after another. They lie in
// pages that are never moved, so that many steps take no more memory than they need.
template <class T>
class TileRecord {
public:
    int64_t counts[LANES<T>] = {};
    int64_t size = 0;  // steps in use: the largest count
    std::vector<Stay> stays;

    Step<T> operator[](int64_t i) const {
        const Step<T>& page = pages_[i / PAGE];
        const int64_t at = i % PAGE * LANES<T>;
        return {page.y + at * dim_, page.t + at, page.t1 + at, page.outputs + at};
    }

    // Add a step of a lane, from another lane of what is given.
    void add(int lane, const Step<T>& given, int from, int64_t dim) {
        dim_ = dim;
        const int64_t i = counts[lane]++;
        if (i == size && size++ % PAGE == 0) add_page();
        const Step<T> step = (*this)[i];
        for (int64_t j = 0; j < dim; ++j)
            step.y[j * LANES<T> + lane] = given.y[j * LANES<T> + from];
        step.t[lane] = given.t[from], step.t1[lane] = given.t1[from];
        step.outputs[lane] = given.outputs[from];
    }

    // Let the steps of a lane from `first` on be another's last ones, too.
    void copy(int from, int64_t first, int to) {
        for (int64_t i = first; i < counts[from]; ++i) add(to, (*this)[i], from, dim_);
    }

    // Those with the most steps first: lanes that take them up in this order end at
    // about the same time.
    void sort() {
        std::stable_sort(stays.begin(), stays.end(), [](const Stay& a, const Stay& b) {
            const int64_t more = a.end - a.first, less = b.end - b.first;
            return more != less ? more > less : a.sample < b.sample;
        });
    }

    int64_t bytes() const {
        return states_.bytes() + times_.bytes() + outputs_.bytes() +
               static_cast<int64_t>(stays.capacity() * sizeof(Stay));
    }

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

// The polynomial of one lane in a step: coefficients of every power, the components side
// by side as outputs have them. Backwards it takes up what outputs ask of each power.
template <class T>
class LanePolynomial {
    typedef T Four __attribute__((vector_size(4 * sizeof(T)), may_alias));

public:
    LanePolynomial(int64_t rows, int degree, int64_t n_times)
        : rows_(rows), degree_(degree), n_((rows + 3) / 4) {
        if (degree < 1 || degree > MOST) throw std::invalid_argument("degree of outputs");
        coefficients_ = arena_.take(4 * n_ * (degree + 1));
        places_ = arena_.take(n_times);
    }

    // Set where in the step its outputs are, of times from `first` on up to `end`.
    void place(const Times& times, int64_t first, int64_t end, double t, double t1) {
        count_ = end - first;
        const double per_length = 1 / (t1 - t);
        for (int64_t k = 0; k < count_; ++k) {
            const double theta = (times[first + k] - t) * per_length;
            places_[k] = static_cast<T>(std::min(std::max(theta, 0.0), 1.0));
        }
    }

    // From a lane of (rows, LANES) for power 0, and of (degree, rows, LANES) for others.
    void read(const T* constant, const T* others) {
        for (int m = 0; m <= degree_; ++m) {
            const T* from = m ? others + (m - 1) * rows_ * LANES<T> : constant;
            for (int64_t i = 0; i < rows_; ++i) at(m)[i] = from[i * LANES<T>];
        }
    }

    // Evaluate it for all outputs, (outputs, rows).
    void write(T* to) const {
        with_degree<1>([&](auto degree) { write_with<decltype(degree)::value>(to); });
    }

    // Set it to the sums of cotangents of the outputs (outputs, rows) times each power.
    void gather(const T* cotangents) {
        with_degree<1>([&](auto degree) { gather_with<decltype(degree)::value>(cotangents); });
    }

    // Put it into a lane of (degree + 1, rows, LANES).
    void put(T* moments) const {
        for (int m = 0; m <= degree_; ++m)
            for (int64_t i = 0; i < rows_; ++i)
                moments[(m * rows_ + i) * LANES<T>] = at(m)[i];
    }

private:
    static constexpr int MOST = 7;  // the highest degree of all methods
    const int64_t rows_;
    const int degree_;
    const int64_t n_;
    int64_t count_ = 0;
    Arena<T> arena_;
    T *coefficients_, *places_;

    T* at(int m) const { return coefficients_ + 4 * n_ * m; }
    Four& four(int m, int64_t i) const { return reinterpret_cast<Four*>(at(m))[i]; }
    int64_t bytes(int64_t i) const {
        return std::min<int64_t>(4, rows_ - 4 * i) * static_cast<int64_t>(sizeof(T));
    }

    // With the degree as a constant, coefficients are in registers.
    template <int D, class Action>
    void with_degree(const Action& action) const {
        if constexpr (D < MOST)
            if (degree_ != D) return with_degree<D + 1>(action);
        action(std::integral_constant<int, D>{});
    }

    template <int D>
    void write_with(T* to) const {
        for (int64_t i = 0; i < n_; ++i) {
            Four c[D + 1];
            for (int m = 0; m <= D; ++m) c[m] = four(m, i);
            const int64_t size = bytes(i);
            for (int64_t k = 0; k < count_; ++k) {
                Four value = c[D];
                for (int m = D - 1; m >= 0; --m) value = value * places_[k] + c[m];
                T* place = to + k * rows_ + 4 * i;
                if (size == sizeof(Four))
                    std::memcpy(place, &value, sizeof(Four));
                else
                    std::memcpy(place, &value, size);
            }
        }
    }

    template <int D>
    void gather_with(const T* cotangents) {
        for (int64_t i = 0; i < n_; ++i) {
            Four c[D + 1] = {};
            const int64_t size = bytes(i);
            for (int64_t k = 0; k < count_; ++k) {
                const T* place = cotangents + k * rows_ + 4 * i;
                Four g{};
                if (size == sizeof(Four))
                    std::memcpy(&g, place, sizeof(Four));
                else
                    std::memcpy(&g, place, size);
                for (int m = 0; m <= D; ++m, g *= places_[k]) c[m] += g;
            }
            for (int m = 0; m <= D; ++m) four(m, i) = c[m];
        }
    }
};

// Steps with a network; `E` evaluates its kind on a tile.
template <class E>
class NetworkStepper : public TileStepper<typename E::Value> {
protected:
    using T = typename E::Value;
    using Base = TileStepper<T>;

    NetworkStepper(const Problem& problem, const typename E::Net& network,
                   const Coefficients<T>& rk, Watch& watch, E& evaluator)
        : Base(problem.control, rk, watch, network.dim, network.uses_time), p_(problem),
          evaluator_(evaluator) {}

    const Problem& p_;
    E& evaluator_;

    const T* initial(int64_t sample) const {
        return static_cast<const T*>(p_.y0) + sample * this->rows_;
    }

    void evaluate(int, T* state, const double* times, T* slope) final {
        if (this->uses_time_)
            for (int l = 0; l < this->lanes_; ++l)
                state[this->size_ + l] = static_cast<T>(times[l] * this->sign_[l]);
        evaluator_.evaluate(state, slope, this->lanes_);
    }
};

// Samples that wait to be solved; threads may share them.
struct Queue {
    std::atomic<int64_t> next;
    const int64_t end;
    Queue(int64_t first, int64_t end) : next(first), end(end) {}

    // Leave the rest unsolved.
    void stop() { next = end; }
};

// The next samples, each at its start: with its first slope and its first step.
template <class E>
class TileEntrance final : public NetworkStepper<E> {
    using Base = NetworkStepper<E>;
    using T = typename Base::T;

public:
    TileEntrance(const Problem& problem, const typename E::Net& network,
                 const Coefficients<T>& rk, Watch& watch, E& evaluator)
        : Base(problem, network, rk, watch, evaluator) {}

    // The lane in which the next sample waits, or a negative number.
    int next(Queue& queue) {
        if (waiting_ == n_ && !begin_some(queue)) return -1;
        return order_[waiting_++];
    }
    int64_t sample(int lane) const { return first_ + lane; }
    const TileStepper<T>& tile() const { return *this; }

private:
    int64_t first_ = 0;
    int waiting_ = 0, n_ = 0;
    int order_[LANES<T>];  // of lanes

    bool begin_some(Queue& queue) {
        n_ = waiting_ = 0;
        if (queue.next.load(std::memory_order_relaxed) >= queue.end) return false;
        first_ = queue.next.fetch_add(LANES<T>);
        if (first_ >= queue.end) return false;
        n_ = static_cast<int>(std::min<int64_t>(LANES<T>, queue.end - first_));
        this->lanes_ = E::lanes_for(n_);
        for (int l = 0; l < this->lanes_; ++l) {
            const Times times(this->p_, first_ + (l < n_ ? l : 0));
            this->sign_[l] = times.sign;
            this->t_[l] = times[0];
            this->t_end_[l] = l < n_ ? times[times.n - 1] : times[0];
            for (int64_t i = 0; i < this->rows_; ++i)
                this->y_[i * LANES<T> + l] = l < n_ ? this->initial(first_ + l)[i] : T(0);
        }
        this->begin();
        // Samples with the shortest first step for their time will take most steps: if
        // they came last, other lanes would be idle at the end.
        for (int l = 0; l < n_; ++l) order_[l] = l;
        std::stable_sort(order_, order_ + n_, [&](int a, int b) { return share(a) < share(b); });
        return true;
    }

    // The share of its time that the first step of a lane takes; zero where that is not a
    // number, which has no place in an order.
    double share(int l) const {
        const double share = this->next_[l] / (this->t_end_[l] - this->t_[l]);
        return share >= 0 ? share : 0.0;
    }
};

// Let `go_over(to, from)` free all lanes but the leading ones; return how many are left.
template <class Busy, class GoOver>
static int narrow(const Busy* busy, int before, int lanes, const GoOver& go_over) {
    for (int to = 0, from = lanes; from < before; ++from) {
        if (!busy[from]) continue;
        while (busy[to]) ++to;
        go_over(to, from);
    }
    return lanes;
}

template <class E>
class TileSolver final : public NetworkStepper<E> {
    using Base = NetworkStepper<E>;
    using T = typename Base::T;
    using Base::arena_, Base::rk_, Base::rows_, Base::size_;
    using Base::y_, Base::k_, Base::state_, Base::moved_, Base::started_, Base::running_;
    using Base::lanes_, Base::t_, Base::t1_, Base::length_, Base::sign_;
    using Base::p_, Base::initial, Base::combine, Base::evaluate_stage;

public:
    TileSolver(const Problem& problem, const typename E::Net& network,
               const Coefficients<T>& rk, Watch& watch, E& evaluator)
        : Base(problem, network, rk, watch, evaluator),
          entrance_(problem, network, rk, watch, evaluator),
          path_(network.dim, rk.degree, problem.n_times) {
        polynomial_ = arena_.take(size_ * std::max(rk.degree, 1));
    }

    // Solve samples until there are none; record their steps on request.
    void solve(Queue& queue, TileRecord<T>* record) {
        lanes_ = LANES<T>;
        for (int l = 0; l < LANES<T>; ++l) {
            sample_[l] = NOBODY, running_[l] = false, output_[l] = 0;
            sign_[l] = 1, this->next_[l] = 0;
            t_[l] = this->goal_[l] = this->near_goal_[l] = Times(p_, 0)[0];
            for (int64_t i = 0; i < rows_; ++i)
                y_[i * LANES<T> + l] = this->slope_[i * LANES<T> + l] = T(0);
        }
        try {
            fill_lanes(queue, record);
            this->run([&] {
                step(record);
                fill_lanes(queue, record);
            });
        } catch (...) {
            queue.stop();
            throw;
        }
    }

private:
    static constexpr int64_t NOBODY = -1;
    TileEntrance<E> entrance_;
    LanePolynomial<T> path_;
    T* polynomial_;
    int64_t sample_[LANES<T>], n_dense_[LANES<T>], output_[LANES<T>], first_output_[LANES<T>];
    int64_t first_step_[LANES<T>];  // in the record of the lane

    T* output(int lane, int64_t column) const {
        return static_cast<T*>(p_.y) + (sample_[lane] * p_.n_times + column) * rows_;
    }

    // Output times from `column` on hold the last state: of a lane that never moved,
    // the first, whatever it is.
    void hold(int lane, int64_t column) const {
        for (; column < p_.n_times; ++column) {
            T* to = output(lane, column);
            for (int64_t i = 0; i < rows_; ++i)
                to[i] = started_[lane] ? y_[i * LANES<T> + lane] : initial(sample_[lane])[i];
        }
    }

    // Lanes that are done take the next samples, as long as there are any; then, the
    // leading lanes take those of the others, if there are enough of them.
    void fill_lanes(Queue& queue, TileRecord<T>* record) {
        int running = 0;
        for (int l = 0; l < lanes_; ++l) {
            while (!running_[l]) {
                if (sample_[l] != NOBODY) leave(l, record);
                const int waiting = entrance_.next(queue);
                if (waiting < 0) break;
                enter(l, waiting, record);
            }
            running += running_[l];
        }
        lanes_ = narrow(running_, lanes_, E::lanes_for(running), [&](int to, int from) {
            go_over(to, from, record);
        });
    }

    // The sample of a lane goes to another one, which is idle.
    void go_over(int to, int from, TileRecord<T>* record) {
        this->take(to, *this, from);
        sample_[to] = sample_[from], n_dense_[to] = n_dense_[from];
        output_[to] = output_[from], first_output_[to] = first_output_[from];
        sample_[from] = NOBODY, running_[from] = false;
        if (!record) return;
        const int64_t first = record->counts[to];
        record->copy(from, first_step_[from], to);
        first_step_[to] = first;
    }

    void enter(int l, int waiting, const TileRecord<T>* record) {
        sample_[l] = entrance_.sample(waiting);
        this->take(l, entrance_.tile(), waiting);
        const Times times(p_, sample_[l]);
        n_dense_[l] = 0;
        int64_t at_start = 0;
        while (at_start < times.n && times[at_start] == times[0]) ++at_start;
        output_[l] = std::min(at_start, times.n - 1);
        first_output_[l] = at_start;
        first_step_[l] = record ? record->counts[l] : 0;
        for (int64_t c = 0; c < at_start; ++c)
            std::memcpy(output(l, c), initial(sample_[l]), rows_ * sizeof(T));
        aim_at_grid(l);
    }

    void leave(int l, TileRecord<T>* record) {
        const int64_t sample = sample_[l];
        const int64_t first_held = std::max(output_[l], first_output_[l]);
        hold(l, first_held);
        p_.status[sample] = this->status_[l];
        p_.n_steps[sample] = this->n_steps_[l];
        p_.n_rejected[sample] = this->n_rejected_[l];
        p_.n_dense[sample] = n_dense_[l];
        p_.next_output[sample] = output_[l];
        p_.t_reached[sample] = t_[l] * sign_[l];
        if (record)
            record->stays.push_back(
                {sample, l, first_step_[l], record->counts[l], first_output_[l], first_held});
        sample_[l] = NOBODY;
    }

    // Steps on a grid, the same for all samples, end there and nowhere else.
    void aim_at_grid(int l) {
        const std::vector<double>& grid = p_.control.grid;
        if (!grid.empty() && running_[l])
            this->aim(l, grid[this->n_steps_[l] + 1] * sign_[l]);
    }

    void step(TileRecord<T>* record) {
        alignas(64) double ratio[LANES<T>];
        this->attempt(ratio);
        for (int l = 0; record && l < lanes_; ++l)
            if (moved_[l]) record->add(l, {y_, t_, t1_, output_}, l, rows_);
        if (p_.n_times > 2) write_outputs();
        this->conclude(ratio);
        for (int l = 0; l < lanes_; ++l) aim_at_grid(l);
    }

    // Evaluate the dense output where output times fell into a step.
    void write_outputs() {
        bool any = false;
        for (int l = 0; l < lanes_; ++l)
            if (moved_[l] && output_[l] < p_.n_times - 1)
                any = any || Times(p_, sample_[l])[output_[l]] <= t1_[l];
        if (!any) return;
        for (int i = rk_.n_stages; i < rk_.n_extended; ++i) {
            combine(i, state_);
            evaluate_stage(i, state_, slope_extra());
        }
        for (int m = 0; m < rk_.degree; ++m)
            each_register<T>(size_, lanes_, [&](int64_t at, int) {
                Vec<T> sum{};
                for (int j = 0; j < rk_.n_extended; ++j)
                    sum += load(k_ + j * size_ + at) * rk_.dense[j * rk_.degree + m];
                store(polynomial_ + m * size_ + at, sum);
            });
        for (int l = 0; l < lanes_; ++l) {
            if (!moved_[l]) continue;
            const Times times(p_, sample_[l]);
            const int64_t before = output_[l];
            int64_t after = before;
            while (after < p_.n_times - 1 && times[after] <= t1_[l]) ++after;
            if (after == before) continue;
            output_[l] = after, ++n_dense_[l];
            path_.place(times, before, after, t_[l], t1_[l]);
            path_.read(y_ + l, polynomial_ + l);
            path_.write(output(l, before));
        }
    }

    // The slope at the end of the step is still needed: a further one goes elsewhere.
    T* slope_extra() {
        if (!extra_) extra_ = arena_.take(size_);
        return extra_;
    }
    T* extra_ = nullptr;
};

template <class E>
class TileReverse {
    using T = typename E::Value;

public:
    TileReverse(const Problem& problem, const typename E::Net& network,
                const Coefficients<T>& rk, const ReverseProblem& reverse, Watch& watch)
        : p_(problem), net_(network), rk_(rk), watch_(watch),
          grad_(static_cast<const T*>(reverse.grad)),
          grad_y0_(static_cast<T*>(reverse.grad_y0)), dim_(network.dim),
          size_(network.dim * LANES<T>), wide_(network.inputs * LANES<T>),
          evaluator_(network, rk.n_extended, true),
          path_(network.dim, rk.degree, problem.n_times) {
        const int n = rk.n_extended;
        k_ = arena_.take(size_ * n), states_ = arena_.take(wide_ * n);
        kappa_ = arena_.take(size_ * n), back_ = arena_.take(size_ * n);
        y_ = arena_.take(size_), lam_ = arena_.take(size_), h_ = arena_.take(LANES<T>);
        moments_ = arena_.take(size_ * (rk.degree + 1));
        b_.assign(n, T(0));
        for (int i = 0; i < rk.n_stages - 1; ++i) b_[i] = rk.row(rk.n_stages - 1)[i];
    }

    void reverse(const TileRecord<T>& record, std::vector<LayerSum<T>>& sums) {
        std::fill(lam_, lam_ + size_, T(0)), std::fill(y_, y_ + size_, T(0));
        next_ = 0, lanes_ = LANES<T>;
        for (int l = 0; l < lanes_; ++l) {
            sign_[l] = 1, t_[l] = t1_[l] = 0;
            enter_next(l, record);
        }
        while (narrow_to_busy()) {
            watch_.look();
            read_steps(record);
            step(record, sums);
            for (int l = 0; l < lanes_; ++l) {
                if (!stay_[l] || --at_[l] >= stay_[l]->first) continue;
                leave(l, *stay_[l]);
                enter_next(l, record);
            }
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
    T *y_, *k_, *states_, *kappa_, *back_, *lam_, *h_, *moments_;
    LanePolynomial<T> path_;
    std::vector<T> b_;
    double sign_[LANES<T>], t_[LANES<T>], t1_[LANES<T>];
    const Stay* stay_[LANES<T>];  // or null, where nothing is left to do
    int64_t at_[LANES<T>];        // its step, in its lane of the record
    size_t next_;
    int lanes_;  // those that are computed, the leading ones

    const T* cotangent(int64_t sample, int64_t column) const {
        return grad_ + (sample * p_.n_times + column) * dim_;
    }

    void add_cotangent(int lane, int64_t sample, int64_t column) {
        const T* g = cotangent(sample, column);
        for (int64_t i = 0; i < dim_; ++i) lam_[i * LANES<T> + lane] += g[i];
    }

    // Compute no more lanes than those that are busy take; return whether there are any.
    bool narrow_to_busy() {
        int busy = 0;
        for (int l = 0; l < lanes_; ++l) busy += stay_[l] != nullptr;
        lanes_ = narrow(stay_, lanes_, E::lanes_for(busy), [&](int to, int from) {
            stay_[to] = stay_[from], at_[to] = at_[from], sign_[to] = sign_[from];
            for (int64_t i = 0; i < size_; i += LANES<T>) lam_[i + to] = lam_[i + from];
            stay_[from] = nullptr;
        });
        return busy > 0;
    }

    // Go to the end of the next sample; of those that took no steps, to their start.
    void enter_next(int l, const TileRecord<T>& record) {
        for (; next_ < record.stays.size(); leave(l, *stay_[l])) {
            const Stay& stay = record.stays[next_++];
            stay_[l] = &stay, at_[l] = stay.end - 1;
            sign_[l] = Times(p_, stay.sample).sign;
            for (int64_t i = 0; i < dim_; ++i) lam_[i * LANES<T> + l] = T(0);
            for (int64_t c = stay.first_held; c < p_.n_times; ++c)
                add_cotangent(l, stay.sample, c);
            if (stay.end > stay.first) return;
        }
        // steps of length zero from where the last one was, without a cotangent
        stay_[l] = nullptr, t1_[l] = t_[l];
        for (int64_t i = 0; i < dim_; ++i) lam_[i * LANES<T> + l] = T(0);
    }

    void leave(int l, const Stay& stay) {
        for (int64_t c = 0; c < stay.first_output; ++c) add_cotangent(l, stay.sample, c);
        for (int64_t i = 0; i < dim_; ++i)
            grad_y0_[stay.sample * dim_ + i] = lam_[i * LANES<T> + l];
    }

    // Fetch the step that each lane goes back over.
    void read_steps(const TileRecord<T>& record) {
        for (int l = 0; l < lanes_; ++l) {
            if (stay_[l]) {
                const int from = stay_[l]->lane;
                const Step<T> step = record[at_[l]];
                t_[l] = step.t[from], t1_[l] = step.t1[from];
                for (int64_t i = 0; i < dim_; ++i)
                    y_[i * LANES<T> + l] = step.y[i * LANES<T> + from];
            }
            h_[l] = static_cast<T>((t1_[l] - t_[l]) * sign_[l]);
        }
    }

    void step(const TileRecord<T>& record, std::vector<LayerSum<T>>& sums) {
        const bool dense = gather_outputs(record);
        const int n = dense ? rk_.n_extended : rk_.n_stages - 1;

        for (int i = 0; i < n; ++i) {
            T* state = states_ + i * wide_;
            const T* a = rk_.row(i);
            each_register<T>(size_, lanes_, [&](int64_t at, int) {
                Vec<T> sum = load(y_ + at);
                for (int j = 0; j < i; ++j) sum += load(k_ + j * size_ + at) * a[j];
                store(state + at, sum);
            });
            if (net_.uses_time)
                for (int l = 0; l < lanes_; ++l)
                    state[dim_ * LANES<T> + l] =
                        static_cast<T>(stage_time(rk_.c[i], t_[l], t1_[l]) * sign_[l]);
            T* k = k_ + i * size_;
            evaluator_.linearize(i, state, k, lanes_);
            each_register<T>(size_, lanes_, [&](int64_t at, int g) {
                store(k + at, load(k + at) * load(h_ + g));
            });
        }

        for (int i = n - 1; i >= 0; --i) {
            T* kappa = kappa_ + i * size_;
            each_register<T>(size_, lanes_, [&](int64_t at, int g) {
                Vec<T> sum = load(lam_ + at) * b_[i];
                for (int j = n - 1; j > i; --j)
                    sum += load(back_ + j * size_ + at) * rk_.row(j)[i];
                if (dense)
                    for (int m = 0; m < rk_.degree; ++m)
                        sum += load(moments_ + (m + 1) * size_ + at) *
                               rk_.dense[i * rk_.degree + m];
                store(kappa + at, sum * load(h_ + g));
            });
            evaluator_.pullback(i, kappa, back_ + i * size_, lanes_);
        }
        evaluator_.accumulate(sums, states_, kappa_, n, lanes_);
        each_register<T>(size_, lanes_, [&](int64_t at, int) {
            Vec<T> sum = load(lam_ + at);
            for (int i = n - 1; i >= 0; --i) sum += load(back_ + i * size_ + at);
            if (dense) sum += load(moments_ + at);
            store(lam_ + at, sum);
        });
    }

    // The cotangents of a step's outputs, by the power of their place in it.
    bool gather_outputs(const TileRecord<T>& record) {
        if (p_.n_times <= 2) return false;
        bool any = false;
        for (int l = 0; l < lanes_; ++l) {
            if (!stay_[l]) continue;
            const Stay& stay = *stay_[l];
            const int64_t from = record[at_[l]].outputs[stay.lane];
            const int64_t to = at_[l] + 1 < stay.end ? record[at_[l] + 1].outputs[stay.lane]
                                                     : stay.first_held;
            if (from == to) continue;
            if (!any) std::fill(moments_, moments_ + size_ * (rk_.degree + 1), T(0));
            any = true;
            path_.place(Times(p_, stay.sample), from, to, t_[l], t1_[l]);
            path_.gather(cotangent(stay.sample, from));
            path_.put(moments_ + l);
        }
        return any;
    }
};

// Run `count` jobs on some threads; which thread has which does not matter to them. What
// one throws ends all and is thrown on.
template <class Worker>
static void run_jobs(int64_t count, int threads, const Worker& worker) {
    std::atomic<int64_t> next{0}, workers{0};
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr failure;
    const auto work = [&] {
        if (workers++ >= count) return;  // nothing to do for further ones
        try {
            worker(next);
        } catch (...) {
            next = count;
            if (!failed.test_and_set()) failure = std::current_exception();
        }
    };
    using Work = decltype(work);
    void* data = const_cast<void*>(static_cast<const void*>(&work));
    const auto call = [](void* given) { (*static_cast<Work*>(given))(); };
    const int useful = static_cast<int>(std::min<int64_t>(threads, count));
    run_on_threads(threads, useful, call, data);
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

// How many tiles' worth of samples go through a tile, lane after lane: the more, the
// fewer lanes are idle at its end, and the fewer threads can share the work. It doesn't
// depend on their number, nor do the results.
static inline int64_t turns(int64_t tiles, bool worth_threads) {
    if (!worth_threads) return 8;
    return tiles < 4 ? 1 : std::clamp<int64_t>(tiles / 8, 2, 8);
}

template <class E>
class TiledRecording final : public Recording {
    using T = typename E::Value;

public:
    explicit TiledRecording(const Problem& problem)
        : p_(problem), net_(problem.model), rk_(problem.tableau) {
        const int64_t tiles = (p_.batch + LANES<T> - 1) / LANES<T>;
        samples_ = LANES<T> * turns(tiles, p_.worth_threads);
        n_ = (p_.batch + samples_ - 1) / samples_;
        if (p_.record) records_.resize(n_);
        Watch watch(p_.interrupted);
        // what is not recorded may be solved by anyone
        Queue all(0, p_.batch);
        run_jobs(p_.record ? n_ : tiles, p_.threads, [&](std::atomic<int64_t>& next) {
            E evaluator(net_, 1, false);
            TileSolver<E> solver(p_, net_, rk_, watch, evaluator);
            if (!p_.record) return solver.solve(all, nullptr);
            for (int64_t i = next++; i < n_; i = next++) {
                Queue some(i * samples_, std::min(p_.batch, (i + 1) * samples_));
                solver.solve(some, &records_[i]);
                records_[i].sort();
            }
        });
    }

    void reverse(const ReverseProblem& problem) const override {
        TileSums<typename E::Net> sums(net_, n_);
        Watch watch(problem.interrupted);
        run_jobs(sums.chunks(), problem.threads, [&](std::atomic<int64_t>& next) {
            TileReverse<E> tile(p_, net_, rk_, problem, watch);
            for (int64_t c = next++; c < sums.chunks(); c = next++)
                sums.fill(c, [&](int64_t i, std::vector<LayerSum<T>>& sum) {
                    tile.reverse(records_[i], sum);
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
    int64_t samples_, n_;  // of a record, and the number of records
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
