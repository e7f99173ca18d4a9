// One step after another of a tile: every lane with its own time, step size and fate.
// The numbers are those of integrate.py, which says why; here only how.

// The smallest step worth taking, relative to the time.
constexpr double RESOLUTION = 4 * 2.220446049250313e-16;
constexpr double FIRST_ERROR = 1.0;  // that the first step aims at, in tolerances

template <class T>
struct Coefficients {
    int n_stages, n_extended, degree, n_estimates;
    std::vector<T> a, error, dense;
    std::vector<double> c;

    explicit Coefficients(const Tableau& x)
        : n_stages(x.n_stages), n_extended(x.n_extended), degree(x.degree),
          n_estimates(x.n_estimates), a(x.a.begin(), x.a.end()),
          error(x.error.begin(), x.error.end()), dense(x.dense.begin(), x.dense.end()),
          c(x.c) {}

    const T* row(int stage) const { return a.data() + stage * n_extended; }
};

// The time of a stage: the ends exactly, and never beyond them.
static inline double stage_time(double c, double t, double t1) {
    if (c == 1.0) return t1;
    const double at = t + c * (t1 - t);
    return std::min(std::max(at, std::min(t, t1)), std::max(t, t1));
}

// What all solves of a tile share: steps, their errors, and how long the next one is.
// Times ascend; `sign_` turns them back. Only the leading `lanes_` lanes are computed.
template <class T>
class TileStepper {
protected:
    TileStepper(const Control& control, const Coefficients<T>& rk, Watch& watch, int64_t rows,
                bool uses_time)
        : control_(control), rk_(rk), watch_(watch), uses_time_(uses_time), rows_(rows),
          size_(rows * LANES<T>) {
        // states to evaluate at have room for the time
        const int64_t wide = size_ + LANES<T>;
        y_ = arena_.take(size_), slope_ = arena_.take(size_), y1_ = arena_.take(wide);
        slope1_ = arena_.take(size_), state_ = arena_.take(wide);
        k_ = arena_.take(size_ * rk.n_extended);
        h_ = arena_.take(LANES<T>), moves_ = arena_.take(LANES<T>);
    }
    ~TileStepper() = default;

    // The slope of a state of (rows, LANES) at ascending times; which stage it is for.
    // There is room for another row after the state.
    virtual void evaluate(int stage, T* state, const double* times, T* slope) = 0;

    const Control& control_;
    const Coefficients<T>& rk_;
    Watch& watch_;
    const bool uses_time_;  // whether `evaluate` does
    const int64_t rows_, size_;
    Arena<T> arena_;
    int lanes_ = LANES<T>;
    T *y_, *slope_, *y1_, *slope1_, *state_, *k_, *h_, *moves_;
    bool running_[LANES<T>], accepted_[LANES<T>], started_[LANES<T>], moved_[LANES<T>];
    bool rejected_[LANES<T>];  // whether the last attempt was
    double t_[LANES<T>], t_end_[LANES<T>], floor_[LANES<T>], next_[LANES<T>];
    double goal_[LANES<T>], near_goal_[LANES<T>];  // the next stop, or the end
    double sign_[LANES<T>], t1_[LANES<T>], length_[LANES<T>];
    alignas(64) double history_[2][LANES<T>];  // of errors, the last one first
    int64_t status_[LANES<T>], n_steps_[LANES<T>], n_rejected_[LANES<T>];

    bool any_running() const {
        for (int l = 0; l < lanes_; ++l)
            if (running_[l]) return true;
        return false;
    }

    // Evaluate the first slope and choose the first step, from y_, t_, t_end_, sign_.
    void begin() {
        std::memcpy(state_, y_, size_ * sizeof(T));
        evaluate(0, state_, t_, slope_);
        for (int l = 0; l < lanes_; ++l) {
            status_[l] = n_steps_[l] = n_rejected_[l] = 0;
            history_[0][l] = history_[1][l] = 1.0;
            started_[l] = rejected_[l] = false;
            bool good = true;
            for (int64_t i = 0; i < rows_; ++i)
                good = good && std::isfinite(y_[i * LANES<T> + l]) &&
                       std::isfinite(slope_[i * LANES<T> + l]);
            const double interval = t_end_[l] - t_[l];
            if (!good) {
                for (int64_t i = 0; i < rows_; ++i)
                    y_[i * LANES<T> + l] = slope_[i * LANES<T> + l] = T(0);
                if (interval > 0) status_[l] = Status::non_finite;
                t_end_[l] = t_[l];
            }
            const double least = std::max(control_.min_step, 2.2250738585072014e-308);
            floor_[l] = std::max(interval * (1e-3 * 2.220446049250313e-16), least);
            running_[l] = t_[l] < t_end_[l];
            aim(l, t_end_[l], 1e-6 * std::max(control_.step_size, 0.0));
        }
        choose_first();
    }

    // Step to a goal; a step that gets as near as this goes there.
    void aim(int l, double goal, double slack = 0.0) {
        goal_[l] = goal;
        const double largest = std::max(std::fabs(t_[l]), std::fabs(goal));
        near_goal_[l] = goal - std::max(4 * RESOLUTION * largest, slack);
    }

    // Take steps until all lanes are done.
    template <class Step>
    void run(const Step& step) {
        while (any_running()) {
            watch_.look();
            step();
        }
    }

    // Make a lane go on as another one, of any tile that has begun.
    void take(int l, const TileStepper& from, int other) {
        for (int64_t i = 0; i < rows_; ++i) {
            y_[i * LANES<T> + l] = from.y_[i * LANES<T> + other];
            slope_[i * LANES<T> + l] = from.slope_[i * LANES<T> + other];
        }
        running_[l] = from.running_[other], started_[l] = from.started_[other];
        rejected_[l] = from.rejected_[other], sign_[l] = from.sign_[other];
        t_[l] = from.t_[other], t_end_[l] = from.t_end_[other];
        floor_[l] = from.floor_[other], next_[l] = from.next_[other];
        goal_[l] = from.goal_[other], near_goal_[l] = from.near_goal_[other];
        history_[0][l] = from.history_[0][other], history_[1][l] = from.history_[1][other];
        status_[l] = from.status_[other], n_steps_[l] = from.n_steps_[other];
        n_rejected_[l] = from.n_rejected_[other];
    }

    // Attempt a step, up to who may move and by which errors.
    void attempt(double* ratio) {
        for (int l = 0; l < lanes_; ++l) {
            t1_[l] = t_[l] + next_length(l);
            if (t1_[l] >= near_goal_[l]) t1_[l] = goal_[l];
            // lanes that have arrived take steps of length zero
            length_[l] = running_[l] ? t1_[l] - t_[l] : 0.0;
            if (!running_[l]) t1_[l] = t_[l];
            h_[l] = static_cast<T>(length_[l] * sign_[l]);
        }
        scale_stage(0, slope_);
        const int last = rk_.n_stages - 1;
        for (int i = 1; i < last; ++i) {
            combine(i, state_);
            evaluate_stage(i, state_, slope1_);
        }
        combine(last, y1_);
        evaluate_stage(last, y1_, slope1_);
        judge(ratio);
        for (int l = 0; l < lanes_; ++l) moved_[l] = accepted_[l] && running_[l];
    }

    double shortest(int l) const { return std::max(std::fabs(t_[l]) * RESOLUTION, floor_[l]); }

    // The next step of a lane, shortened to lead to its goal in equal ones.
    double next_length(int l) const {
        const Control& control = control_;
        const bool asked = n_steps_[l] == 0 && control.first_step > 0;
        if (control.step_size > 0 || asked || !running_[l]) return next_[l];
        const double steps = std::ceil((near_goal_[l] - t_[l]) / next_[l]);
        const double even = (goal_[l] - t_[l]) / std::max(steps, 1.0);
        return even >= shortest(l) ? even : next_[l];
    }

    // Move those that may, and choose everyone's next step.
    void conclude(const double* ratio) {
        move(moved_);
        alignas(64) double factors[LANES<T>] = {};
        if (!(control_.step_size > 0)) find_factors(ratio, factors);
        for (int l = 0; l < lanes_; ++l)
            if (running_[l]) choose_next(l, ratio[l], factors[l], moved_[l]);
    }

    // Root mean squares over the components of every lane.
    void norms(const Vec<T>* squares, int64_t n, double* out) const {
        constexpr int W = width<T>;
        for (int l = 0; l < lanes_; ++l)
            out[l] = static_cast<double>(std::sqrt(squares[l / W][l % W])) /
                     std::sqrt(static_cast<double>(n));
    }

    Vec<T> scale(Vec<T> size) const {
        const T least = std::max(static_cast<T>(control_.atol), std::numeric_limits<T>::min());
        return size * static_cast<T>(control_.rtol) + least;
    }

    void choose_first() {
        const Control& control = control_;
        if (control.step_size > 0) {
            std::fill(next_, next_ + LANES<T>, control.step_size);
            return;
        }
        if (control.first_step > 0) {
            for (int l = 0; l < lanes_; ++l)
                next_[l] = std::min(control.first_step, t_end_[l] - t_[l]);
            return;
        }
        constexpr int W = width<T>;
        double d0[LANES<T>], d1[LANES<T>], d2[LANES<T>], h0[LANES<T>], at[LANES<T>];
        Vec<T> s0[LANES<T> / W] = {}, s1[LANES<T> / W] = {}, s2[LANES<T> / W] = {};
        for (int64_t i = 0; i < rows_; ++i)
            for (int g = 0; g < lanes_ / W; ++g) {
                const int64_t place = i * LANES<T> + g * W;
                const Vec<T> size = scale(magnitude<T>(load(y_ + place)));
                const Vec<T> y = load(y_ + place) / size, k = load(slope_ + place) / size;
                s0[g] += y * y, s1[g] += k * k;
            }
        norms(s0, rows_, d0), norms(s1, rows_, d1);
        for (int l = 0; l < lanes_; ++l) {
            const double interval = t_end_[l] - t_[l];
            h0[l] = d0[l] < 1e-5 || d1[l] < 1e-5 ? 1e-6 : 0.01 * d0[l] / d1[l];
            h0[l] = std::min(std::isfinite(h0[l]) ? h0[l] : 1e-6, interval);
            h_[l] = static_cast<T>(h0[l] * sign_[l]);
            at[l] = std::min(t_[l] + h0[l], t_end_[l]);
        }
        each_register<T>(size_, lanes_, [&](int64_t i, int g) {
            store(state_ + i, load(y_ + i) + load(slope_ + i) * load(h_ + g));
        });
        evaluate(1, state_, at, slope1_);
        for (int64_t i = 0; i < rows_; ++i)
            for (int g = 0; g < lanes_ / W; ++g) {
                const int64_t place = i * LANES<T> + g * W;
                const Vec<T> size = scale(magnitude<T>(load(y_ + place)));
                const Vec<T> change = (load(slope1_ + place) - load(slope_ + place)) / size;
                s2[g] += change * change;
            }
        norms(s2, rows_, d2);
        for (int l = 0; l < lanes_; ++l) {
            const double interval = t_end_[l] - t_[l];
            const double second = d2[l] / h0[l];
            const double steepest = std::isnan(second) ? second : std::max(d1[l], second);
            const double h1 = steepest <= 1e-15
                                  ? std::max(1e-6, h0[l] * 1e-3)
                                  : std::pow(FIRST_ERROR / steepest, 1 / control.error_order);
            double h = std::isnan(h1) ? h1 : std::min(100 * h0[l], h1);
            h = std::min(std::isfinite(h) ? h : h0[l], interval);
            next_[l] = std::max(h, floor_[l]);
        }
    }

    void scale_stage(int stage, const T* slope) {
        T* k = k_ + stage * size_;
        each_register<T>(size_, lanes_, [&](int64_t at, int g) {
            store(k + at, load(slope + at) * load(h_ + g));
        });
    }

    // state = y + sum of the stages so far
    void combine(int stage, T* state) const {
        const T* a = rk_.row(stage);
        each_register<T>(size_, lanes_, [&](int64_t at, int) {
            Vec<T> sum = load(y_ + at);
            for (int j = 0; j < stage; ++j) sum += load(k_ + j * size_ + at) * a[j];
            store(state + at, sum);
        });
    }

    void evaluate_stage(int stage, T* state, T* slope) {
        double times[LANES<T>];
        for (int l = 0; uses_time_ && l < lanes_; ++l)
            times[l] = stage_time(rk_.c[stage], t_[l], t1_[l]);
        evaluate(stage, state, times, slope);
        scale_stage(stage, slope);
    }

    // The scaled error of every lane, and whether its step is accepted.
    void judge(double* ratio) {
        constexpr int W = width<T>;
        if (control_.step_size > 0) {
            for (int l = 0; l < lanes_; ++l) {
                accepted_[l] = true, ratio[l] = 0.0;
                for (int64_t i = 0; i < rows_; ++i)
                    accepted_[l] = accepted_[l] && std::isfinite(y1_[i * LANES<T> + l]);
            }
            return;
        }
        Vec<T> squares[2][LANES<T> / W] = {};
        for (int64_t i = 0; i < rows_; ++i)
            for (int g = 0; g < lanes_ / W; ++g) {
                const int64_t at = i * LANES<T> + g * W;
                const Vec<T> size = scale(
                    larger<T>(magnitude<T>(load(y_ + at)), magnitude<T>(load(y1_ + at))));
                for (int e = 0; e < rk_.n_estimates; ++e) {
                    const T* weights = rk_.error.data() + e * rk_.n_stages;
                    Vec<T> error{};
                    for (int j = 0; j < rk_.n_stages; ++j)
                        error += load(k_ + j * size_ + at) * weights[j];
                    error = error / size;
                    squares[e][g] += error * error;
                }
            }
        norms(squares[0], rows_, ratio);
        if (rk_.n_estimates == 2) {
            double coarse[LANES<T>];
            norms(squares[1], rows_, coarse);
            for (int l = 0; l < lanes_; ++l) {
                const double fine = ratio[l] * ratio[l];
                ratio[l] = fine / std::sqrt(fine + 0.01 * coarse[l] * coarse[l] + 1e-300);
            }
        }
        for (int l = 0; l < lanes_; ++l) {
            if (std::isnan(ratio[l])) ratio[l] = std::numeric_limits<double>::infinity();
            accepted_[l] = ratio[l] <= 1;
        }
    }

    void move(const bool* moved) {
        bool all = true;
        for (int l = 0; l < lanes_; ++l) all = all && moved[l];
        if (all) {
            std::memcpy(y_, y1_, size_ * sizeof(T));
            std::swap(slope_, slope1_);
            return;
        }
        for (int l = 0; l < lanes_; ++l) moves_[l] = moved[l] ? T(1) : T(0);
        each_register<T>(size_, lanes_, [&](int64_t at, int g) {
            const auto goes = load(moves_ + g) > T(0);
            store(y_ + at, goes ? load(y1_ + at) : load(y_ + at));
            store(slope_ + at, goes ? load(slope1_ + at) : load(slope_ + at));
        });
    }

    void choose_next(int l, double ratio, double factor, bool moved) {
        const Control& control = control_;
        const bool adaptive = !(control.step_size > 0);
        ++n_steps_[l];
        started_[l] = true;
        if (moved) t_[l] = t1_[l];
        const double floor = shortest(l);
        // the step may have become longer, by rounding or to reach the end: what was
        // asked for is what has to shrink
        const double tried = moved ? length_[l] : std::min(length_[l], next_[l]);
        if (adaptive) {
            // a step that was cut short says little about the next one
            const bool cut = moved && t1_[l] == goal_[l] && length_[l] < next_[l];
            const double least = cut ? next_[l] : 0.0;
            const bool grows = tried * control.factor_max > least;
            next_[l] = std::max({grows ? tried * limited(l, ratio, factor) : 0.0, least, floor});
            rejected_[l] = !moved;
            if (moved && control.n_history) {
                history_[1][l] = history_[0][l];
                history_[0][l] = std::max(ratio, 1e-4);
            }
        }
        if (!moved) {
            ++n_rejected_[l];
            if (!adaptive || tried <= floor * 1.001) {
                const bool bad = !adaptive || std::isinf(ratio);
                status_[l] = bad ? Status::non_finite : Status::step_too_small;
                t_end_[l] = goal_[l] = near_goal_[l] = t_[l];
            }
        }
        running_[l] = t_[l] < t_end_[l];
        if (running_[l] && n_steps_[l] >= control.max_steps) {
            status_[l] = Status::max_steps;
            running_[l] = false;
        }
    }

    // What the controller makes of the errors of all lanes.
    void find_factors(const double* ratio, double* factors) const {
        const Control& c = control_;
        const double p = c.pcoeff, i = c.icoeff, d = c.dcoeff;
        const double weights[] = {-(p + i + d) / c.error_order, (p + 2 * d) / c.error_order,
                                  -d / c.error_order};
        const double* errors[] = {ratio, history_[0], history_[1]};
        for (int l = 0; l < lanes_; l += width<double>) {
            Vec<double> power{};
            for (int k = 0; k <= std::min(c.n_history, 2); ++k) {
                const auto least = broadcast<double>(1e-100);
                power += logarithm(larger<double>(least, load(errors[k] + l))) * weights[k];
            }
            store(factors + l, exponential<double>(power) * c.safety);
        }
    }

    double limited(int l, double ratio, double factor) const {
        const Control& c = control_;
        if (c.n_history && ratio > 1) factor = std::min(factor, c.safety);
        if (rejected_[l]) factor = std::min(factor, 1.0);
        return std::min(std::max(factor, c.factor_min), c.factor_max);
    }
};
