// A gated recurrent unit that reads series backwards, and its reverse sweep, on tiles of
// samples.
//
// In the notation of torch.nn.GRUCell, with x the inputs of a row and h the state:
//
//     r = logistic(W_ir x + W_hr h + b_r)      z = logistic(W_iz x + W_hz h + b_z)
//     n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
//     h <- (1 - z) n + z h
//
// The reverse sweep has the states before every row and takes the gates from them again:
// that is less work than memory for all of them would be.

// The weights laid out for products, r and z in one on (x, h), with the constants of
// activations in them (see `Network`). What enters n is doubled for it, too:
// tanh(v) = 2 logistic(2 v) - 1.
template <class T>
class GatedUnit {
public:
    using Value = T;
    static constexpr T POWER = T(-LOG2_E);  // activations take arguments times this
    const int64_t n_inputs, size;
    Matrix<T> gates, given, hidden;  // of (x, h) for (r, z); of x and of h for n
    std::vector<T> gates_bias, given_bias, hidden_bias;
    Matrix<T> backward;  // of cotangents for (r, z, hidden)

    explicit GatedUnit(const Recurrence& p)
        : n_inputs(p.n_inputs), size(p.size), gates_bias(2 * size), given_bias(size),
          hidden_bias(size) {
        const T* input_weight = static_cast<const T*>(p.parameters[0]);
        const T* hidden_weight = static_cast<const T*>(p.parameters[1]);
        const T* input_bias = static_cast<const T*>(p.parameters[2]);
        const T* hidden_bias_ = static_cast<const T*>(p.parameters[3]);
        const auto from_x = [&](int64_t r, int64_t c) { return input_weight[r * n_inputs + c]; };
        const auto from_h = [&](int64_t r, int64_t c) { return hidden_weight[r * size + c]; };
        gates = Matrix<T>(2 * size, n_inputs + size, [&](int64_t row, int64_t c) {
            return (c < n_inputs ? from_x(row, c) : from_h(row, c - n_inputs)) * POWER;
        });
        const int64_t n = 2 * size;  // its first row
        given = Matrix<T>(size, n_inputs, [&](int64_t r, int64_t c) {
            return from_x(n + r, c) * (2 * POWER);
        });
        hidden = Matrix<T>(size, size, [&](int64_t r, int64_t c) {
            return from_h(n + r, c) * (2 * POWER);
        });
        backward = Matrix<T>(size, 3 * size, [&](int64_t c, int64_t row) {
            return from_h(row, c) * scale(row);
        });
        for (int64_t row = 0; row < 3 * size; ++row) {
            const T factor = scale(row) * POWER;
            const int64_t r = row - n;
            if (r < 0) {
                gates_bias[row] = (input_bias[row] + hidden_bias_[row]) * factor;
            } else {
                given_bias[r] = input_bias[row] * factor;
                hidden_bias[r] = hidden_bias_[row] * factor;
            }
        }
    }

    // For the sums of gradients it is two layers: one of the inputs, one of the state.
    size_t depth() const { return 2; }
    int64_t out(size_t) const { return 3 * size; }
    int64_t in(size_t layer) const { return layer == 0 ? n_inputs : size; }
    int64_t parameters() const { return 3 * size * (n_inputs + size + 2); }

    // Bring the sums back to the gradients of the parameters as the user has them.
    void unfold(const std::vector<LayerSum<T>>& sums, void* const* gradients) const {
        for (size_t l = 0; l < depth(); ++l) {
            T* weight = static_cast<T*>(gradients[l]);
            T* bias = static_cast<T*>(gradients[2 + l]);
            for (int64_t r = 0; r < out(l); ++r) {
                bias[r] = sums[l].bias[r] * scale(r);
                for (int64_t c = 0; c < in(l); ++c)
                    weight[r * in(l) + c] = sums[l].weight[r * sums[l].stride + c] * scale(r);
            }
        }
    }

private:
    T scale(int64_t row) const { return row < 2 * size ? T(1) : T(2); }
};

// The samples by length, the longest first: those of a tile are then about as long.
static std::vector<int64_t> longest_first(const Recurrence& p) {
    std::vector<int64_t> order(p.batch);
    for (int64_t i = 0; i < p.batch; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return p.lengths[a] > p.lengths[b];
    });
    return order;
}

// A thread's memory for going over the rows of a tile.
template <class T>
class RecurrentTile {
public:
    RecurrentTile(const Recurrence& problem, const GatedUnit<T>& unit,
                  const std::vector<int64_t>& order, Watch& watch, const T* grad = nullptr)
        : p_(problem), unit_(unit), order_(order), watch_(watch), grad_(grad),
          rows_(unit.size * LANES<T>) {
        x_ = arena_.take(unit.n_inputs * LANES<T> + rows_);
        h_ = x_ + unit.n_inputs * LANES<T>;  // follows the inputs, for products with both
        reset_ = arena_.take(2 * rows_), update_ = reset_ + rows_;
        half_ = arena_.take(rows_), hidden_ = arena_.take(rows_);
        real_ = arena_.take(LANES<T>);
        inputs_ = arena_.take(STEPS * unit.n_inputs * LANES<T>);
        if (!grad) return;
        cotangent_ = arena_.take(rows_), through_ = arena_.take(rows_);
        to_inputs_ = arena_.take(STEPS * 3 * rows_);
        to_hidden_ = arena_.take(STEPS * 3 * rows_);
        const int64_t widest = std::max(unit.n_inputs, unit.size);
        turned_ = arena_.take((widest + width<T>) * LANES<T> * STEPS);
    }

    void forward(int64_t tile) {
        place(tile);
        std::fill_n(h_, rows_, T(0));
        for (int64_t group = (steps_ + STEPS - 1) / STEPS - 1; group >= 0; --group) {
            const int64_t first = group * STEPS;
            for (int s = read(first) - 1; s >= 0; --s) {
                if (T* kept = states(tile, first + s)) std::copy_n(h_, rows_, kept);
                take_gates(first, s);
                for (int64_t i = 0; i < rows_; i += width<T>) {
                    const Vec<T> h = load(h_ + i), n = T(2) * load(half_ + i) - T(1);
                    const Vec<T> next = (h - n) * load(update_ + i) + n;
                    store(h_ + i, real(i) > 0 ? next : Vec<T>{});
                }
            }
        }
        T* out = static_cast<T*>(p_.last);
        for (int lane = 0; lane < n_lanes_; ++lane)
            for (int64_t i = 0; i < unit_.size; ++i)
                out[sample_[lane] * unit_.size + i] = h_[i * LANES<T> + lane];
    }

    void reverse(int64_t tile, std::vector<LayerSum<T>>& sums) {
        place(tile);
        std::fill_n(cotangent_, rows_, T(0));
        for (int lane = 0; lane < n_lanes_; ++lane)
            for (int64_t i = 0; i < unit_.size; ++i)
                cotangent_[i * LANES<T> + lane] = grad_[sample_[lane] * unit_.size + i];
        for (int64_t first = 0; first < steps_; first += STEPS) {
            const int n = read(first);
            const T* kept = states(tile, first);
            for (int s = 0; s < n; ++s) {
                std::copy_n(kept + s * rows_, rows_, h_);
                take_gates(first, s);
                pull_back(to_inputs_ + s * 3 * rows_, to_hidden_ + s * 3 * rows_);
            }
            sums[0].add(to_inputs_, inputs_, n, turned_);
            sums[1].add(to_hidden_, kept, n, turned_);
        }
    }

private:
    // Rows of a series that are read at a time, and their gradients summed up.
    static constexpr int STEPS = 8;

    const Recurrence& p_;
    const GatedUnit<T>& unit_;
    const std::vector<int64_t>& order_;
    Watch& watch_;
    const T* grad_;
    const int64_t rows_;  // numbers that a state of a tile has
    Arena<T> arena_;
    T *x_, *h_, *reset_, *update_, *half_, *hidden_, *real_, *inputs_;  // half_: (n + 1) / 2
    T *cotangent_, *through_, *to_inputs_, *to_hidden_, *turned_;
    int n_lanes_ = 0;
    int64_t steps_ = 0;
    int64_t sample_[LANES<T>], length_[LANES<T>];

    void place(int64_t tile) {
        const int64_t first = tile * LANES<T>;
        n_lanes_ = static_cast<int>(std::min<int64_t>(LANES<T>, p_.batch - first));
        std::fill_n(length_, LANES<T>, 0);
        for (int lane = 0; lane < n_lanes_; ++lane) {
            sample_[lane] = order_[first + lane];
            length_[lane] = std::min(p_.lengths[sample_[lane]], p_.length);
        }
        steps_ = std::max<int64_t>(length_[0], 0);
    }

    // The states before a row, or null.
    T* states(int64_t tile, int64_t t) const {
        T* all = static_cast<T*>(p_.states);
        return all ? all + (tile * p_.length + t) * rows_ : nullptr;
    }

    // Read the rows from one on of every lane, zero where it has none; return how many.
    int read(int64_t first) {
        watch_.look();
        const int n = static_cast<int>(std::min<int64_t>(STEPS, steps_ - first));
        const int64_t size = n * unit_.n_inputs;
        for (int lane = 0; lane < LANES<T>; ++lane) {
            const int64_t rows = std::clamp<int64_t>(length_[lane] - first, 0, n);
            const int64_t real = rows * unit_.n_inputs;
            const T* from = static_cast<const T*>(p_.inputs);
            if (real) from += (sample_[lane] * p_.length + first) * unit_.n_inputs;
            T* to = inputs_ + lane;
            for (int64_t i = 0; i < real; ++i) to[i * LANES<T>] = from[i];
            for (int64_t i = real; i < size; ++i) to[i * LANES<T>] = T(0);
        }
        return n;
    }

    Vec<T> real(int64_t i) const { return load(real_ + i % LANES<T>); }

    // Take the gates of one of the rows that were read.
    void take_gates(int64_t first, int s) {
        const int64_t size = h_ - x_;
        std::copy_n(inputs_ + s * size, size, x_);
        for (int lane = 0; lane < LANES<T>; ++lane)
            real_[lane] = first + s < length_[lane] ? T(1) : T(0);
        constexpr Activation sigmoid = Activation::sigmoid;
        product(unit_.gates, unit_.gates_bias.data(), x_, reset_);
        activate_rows<sigmoid>(2 * unit_.size, reset_, reset_);
        product(unit_.given, unit_.given_bias.data(), x_, half_);
        product(unit_.hidden, unit_.hidden_bias.data(), h_, hidden_);
        for (int64_t i = 0; i < rows_; i += width<T>)
            store(half_ + i, load(half_ + i) + load(reset_ + i) * load(hidden_ + i));
        activate_rows<sigmoid>(unit_.size, half_, half_);
    }

    // Cotangents of a row's state become those of what entered r, z and n, from the
    // inputs and from the state before, and of that state.
    void pull_back(T* to_inputs, T* to_hidden) {
        for (int64_t i = 0; i < rows_; i += width<T>) {
            const Vec<T> r = load(reset_ + i), z = load(update_ + i), half = load(half_ + i);
            const Vec<T> g = real(i) > 0 ? load(cotangent_ + i) : Vec<T>{};
            const Vec<T> hidden = load(hidden_ + i) * (T(1) / GatedUnit<T>::POWER);
            const Vec<T> to_n = g * (T(1) - z) * (T(2) * half * (T(1) - half));
            const Vec<T> to_r = to_n * hidden * r * (T(1) - r);
            const Vec<T> to_z = g * (load(h_ + i) - (T(2) * half - T(1))) * z * (T(1) - z);
            store(to_inputs + i, to_r), store(to_hidden + i, to_r);
            store(to_inputs + rows_ + i, to_z), store(to_hidden + rows_ + i, to_z);
            store(to_inputs + 2 * rows_ + i, to_n), store(to_hidden + 2 * rows_ + i, to_n * r);
            store(through_ + i, g * z);
        }
        product(unit_.backward, NO_BIAS<T>, to_hidden, cotangent_);
        for (int64_t i = 0; i < rows_; i += width<T>)
            store(cotangent_ + i, load(cotangent_ + i) + load(through_ + i));
    }
};

template <class T>
static int64_t recurrent_tiles(const Recurrence& p) {
    return (p.batch + LANES<T> - 1) / LANES<T>;
}

template <class T>
static void recur(const Recurrence& p) {
    const GatedUnit<T> unit(p);
    const std::vector<int64_t> order = longest_first(p);
    const int64_t tiles = recurrent_tiles<T>(p);
    Watch watch(p.interrupted);
    run_jobs(tiles, p.threads, [&](std::atomic<int64_t>& next) {
        RecurrentTile<T> tile(p, unit, order, watch);
        for (int64_t i = next++; i < tiles; i = next++) tile.forward(i);
    });
}

template <class T>
static void recur_back(const RecurrenceReverse& problem) {
    const Recurrence& p = problem.forward;
    const GatedUnit<T> unit(p);
    const std::vector<int64_t> order = longest_first(p);
    TileSums<GatedUnit<T>> sums(unit, recurrent_tiles<T>(p));
    Watch watch(p.interrupted);
    run_jobs(sums.chunks(), p.threads, [&](std::atomic<int64_t>& next) {
        RecurrentTile<T> tile(p, unit, order, watch, static_cast<const T*>(problem.grad));
        for (int64_t c = next++; c < sums.chunks(); c = next++)
            sums.fill(c, [&](int64_t i, std::vector<LayerSum<T>>& sum) { tile.reverse(i, sum); });
    });
    unit.unfold(sums.total(), problem.gradients);
}
