// Flows of densities on a tile: a perceptron with gates and biases of time and its
// divergence, alone or added to the flow of a Gaussian mixture. The formulas are those
// of ConcatSquashField, MixtureField and DensityFlow, which say why; here only how.
//
// A state is y (size) and the change of a log-density; time follows it. The layers of
// the model are the hidden ones (one or two), the last one, the kernel of the divergence
// and, with a bias, the modulation, whose outputs are all gates, all biases of hidden
// units and those of the slopes.

template <class T>
class FlowNetwork {
public:
    using Value = T;
    static constexpr bool uses_time = true;
    int64_t dim, inputs, size, hidden, n_units = 0, n_frequencies, n_components;
    Activation activation;
    std::vector<Matrix<T>> forward, backward;
    std::vector<T> modulation_bias, log_weights, centres, variances;
    Matrix<T> to_axes, from_axes;

    explicit FlowNetwork(const Model& model)
        : dim(model.dim), inputs(model.dim + 1), size(model.dim - 1),
          hidden(static_cast<int64_t>(model.layers.size()) - 3),
          n_frequencies(model.flow.n_frequencies),
          n_components(model.flow.mixture.n_components), activation(model.activation),
          layers_(model.layers) {
        for (const Layer& layer : layers_)
            add(static_cast<const T*>(layer.weight), layer.out, layer.in);
        for (int64_t l = 0; l < hidden; ++l) n_units += out(l);
        const Layer& last = layers_.back();
        copy(last.bias, last.out, modulation_bias);
        if (!n_components) return;
        copy(model.flow.mixture.log_weights, n_components, log_weights);
        copy(model.flow.mixture.centres, n_components * size, centres);
        copy(model.flow.mixture.variances, n_components * size, variances);
        const T* axes = static_cast<const T*>(model.flow.mixture.axes);
        const int64_t n = n_components * size;
        const auto at = [&](int64_t r, int64_t c) { return axes[r * n + c]; };
        from_axes = Matrix<T>(size, n, at);
        to_axes = Matrix<T>(n, size, [&](int64_t c, int64_t r) { return at(r, c); });
    }

    size_t depth() const { return layers_.size(); }
    int64_t last() const { return hidden; }
    int64_t kernel() const { return hidden + 1; }
    int64_t modulation() const { return hidden + 2; }
    int64_t out(size_t layer) const { return layers_[layer].out; }
    int64_t in(size_t layer) const { return layers_[layer].in; }
    int64_t parameters() const {
        int64_t n = 0;
        for (const Layer& layer : layers_) n += layer.out * (layer.in + 1);
        return n;
    }
    int64_t widest() const {
        int64_t n = 1;
        for (const Layer& layer : layers_) n = std::max({n, layer.in, layer.out});
        return n;
    }

    void unfold(const std::vector<LayerSum<T>>& sums,
                const std::vector<LayerGradient>& gradients) const {
        for (size_t l = 0; l < depth(); ++l) {
            const LayerSum<T>& sum = sums[l];
            T* weight = static_cast<T*>(gradients[l].weight);
            T* bias = static_cast<T*>(gradients[l].bias);
            for (int64_t r = 0; r < sum.rows; ++r) {
                if (bias) bias[r] = sum.bias[r];
                std::copy(sum.weight + r * sum.stride, sum.weight + r * sum.stride + sum.cols,
                          weight + r * sum.cols);
            }
        }
    }

private:
    std::vector<Layer> layers_;

    static void copy(const void* from, int64_t n, std::vector<T>& to) {
        to.assign(static_cast<const T*>(from), static_cast<const T*>(from) + n);
    }

    void add(const T* weight, int64_t rows, int64_t cols) {
        const auto at = [&](int64_t r, int64_t c) { return weight[r * cols + c]; };
        forward.emplace_back(rows, cols, at);
        backward.emplace_back(cols, rows, [&](int64_t c, int64_t r) { return at(r, c); });
    }
};

// The flow of the mixture at a stage.
template <class T>
class MixtureEvaluator {
public:
    MixtureEvaluator(const FlowNetwork<T>& network, int n_stages)
        : net_(network), rows_(network.n_components * network.size) {
        const int64_t n = rows_ * LANES<T>;
        for (T** p : {&velocities_, &scores_, &slopes_, &inverse_})
            *p = arena_.take(n * n_stages);
        shares_ = arena_.take(net_.n_components * LANES<T> * n_stages);
        first_ = arena_.take(n), second_ = arena_.take(n);
        logs_ = arena_.take(std::max(net_.n_components, net_.size) * LANES<T>);
    }

    // velocity and score (size, LANES) at y and time; keep what the reverse needs.
    void evaluate(int stage, const T* y, const T* time, T* velocity, T* score) {
        constexpr int W = width<T>;
        const int64_t d = net_.size, offset = stage * rows_ * LANES<T>;
        T *velocities = velocities_ + offset, *scores = scores_ + offset;
        T *slopes = slopes_ + offset, *inverse = inverse_ + offset;
        multiply(net_.to_axes, y, first_);
        for (int g = 0; g < LANES<T>; g += W) {
            const Vec<T> t = load(time + g), rest = T(1) - t;
            for (int64_t k = 0; k < net_.n_components; ++k) {
                Vec<T> sum{}, volume = broadcast<T>(1);
                for (int64_t i = k * d; i < (k + 1) * d; ++i) {
                    const int64_t at = i * LANES<T> + g;
                    const Vec<T> u = load(first_ + at) - t * net_.centres[i];
                    const Vec<T> c = rest * rest + t * t * net_.variances[i];
                    const Vec<T> one_by_c = T(1) / c, s = -u * one_by_c;
                    const Vec<T> a = (t * net_.variances[i] - rest) * one_by_c;
                    sum -= u * s, volume *= c;
                    // a logarithm of some variances together, which cannot underflow
                    if ((i - k * d) % TOGETHER == TOGETHER - 1 || i + 1 == (k + 1) * d)
                        sum += logarithm(volume), volume = broadcast<T>(1);
                    store(inverse + at, one_by_c), store(scores + at, s);
                    store(slopes + at, a), store(velocities + at, net_.centres[i] + a * u);
                }
                store(logs_ + k * LANES<T> + g, net_.log_weights[k] - T(0.5) * sum);
            }
        }
        T* shares = shares_ + stage * net_.n_components * LANES<T>;
        share(shares);
        combine(shares, velocities, velocity);
        combine(shares, scores, score);
    }

    // out += what cotangents of velocity and score (size, LANES) are for y.
    void pullback(int stage, const T* of_velocity, const T* of_score, T* out) {
        constexpr int W = width<T>;
        const int64_t d = net_.size, offset = stage * rows_ * LANES<T>;
        const T *velocities = velocities_ + offset, *scores = scores_ + offset;
        const T *slopes = slopes_ + offset, *inverse = inverse_ + offset;
        const T* shares = shares_ + stage * net_.n_components * LANES<T>;
        multiply(net_.to_axes, of_velocity, first_);
        multiply(net_.to_axes, of_score, second_);
        for (int g = 0; g < LANES<T>; g += W) {
            Vec<T> mean{};
            for (int64_t k = 0; k < net_.n_components; ++k) {
                Vec<T> sum{};
                for (int64_t i = k * d; i < (k + 1) * d; ++i) {
                    const int64_t at = i * LANES<T> + g;
                    sum += load(first_ + at) * load(velocities + at) +
                           load(second_ + at) * load(scores + at);
                }
                store(logs_ + k * LANES<T> + g, sum);
                mean += sum * load(shares + k * LANES<T> + g);
            }
            for (int64_t k = 0; k < net_.n_components; ++k) {
                const Vec<T> share = load(shares + k * LANES<T> + g);
                const Vec<T> more = load(logs_ + k * LANES<T> + g) - mean;
                for (int64_t i = k * d; i < (k + 1) * d; ++i) {
                    const int64_t at = i * LANES<T> + g;
                    store(first_ + at, share * (load(first_ + at) * load(slopes + at) -
                                                load(second_ + at) * load(inverse + at) +
                                                more * load(scores + at)));
                }
            }
        }
        multiply(net_.from_axes, first_, logs_);
        for (int64_t i = 0; i < d * LANES<T>; i += W) store(out + i, load(out + i) + load(logs_ + i));
    }

private:
    static constexpr int TOGETHER = sizeof(T) == 4 ? 2 : 8;
    const FlowNetwork<T>& net_;
    const int64_t rows_;
    Arena<T> arena_;
    T *velocities_, *scores_, *slopes_, *inverse_, *shares_, *first_, *second_, *logs_;

    static void multiply(const Matrix<T>& m, const T* x, T* out) {
        product(m, NO_BIAS<T>, x, out);
    }

    // The shares of the components, from `logs_`.
    void share(T* shares) const {
        constexpr int W = width<T>;
        const int64_t n = net_.n_components * LANES<T>;
        for (int g = 0; g < LANES<T>; g += W) {
            Vec<T> most = load(logs_ + g), total{};
            for (int64_t i = g; i < n; i += LANES<T>) most = larger<T>(most, load(logs_ + i));
            for (int64_t i = g; i < n; i += LANES<T>) {
                const Vec<T> e = exponential<T>(load(logs_ + i) - most);
                store(shares + i, e);
                total += e;
            }
            for (int64_t i = g; i < n; i += LANES<T>) store(shares + i, load(shares + i) / total);
        }
    }

    void combine(const T* shares, const T* values, T* out) {
        for (int64_t i = 0; i < rows_; ++i)
            for (int g = 0; g < LANES<T>; g += width<T>)
                store(first_ + i * LANES<T> + g,
                      load(values + i * LANES<T> + g) *
                          load(shares + i / net_.size * LANES<T> + g));
        multiply(net_.from_axes, first_, out);
    }
};

// A thread's memory for evaluating a flow on one tile.
template <class T>
class FlowEvaluator {
public:
    using Value = T;
    using Net = FlowNetwork<T>;

    FlowEvaluator(const FlowNetwork<T>& network, int n_stages, bool reverse)
        : net_(network), mixture_(network, network.n_components ? n_stages : 0) {
        const auto take = [&](int64_t rows) { return Rows{arena_.take(rows * LANES<T> * n_stages), rows}; };
        y_ = take(net_.size), slope_ = take(net_.size), score_ = take(net_.size);
        features_ = take(1 + 2 * net_.n_frequencies);
        modulation_ = take(net_.out(net_.modulation()));
        trace_ = take(net_.out(net_.kernel()));
        for (int64_t l = 0; l < net_.hidden; ++l) {
            const int64_t n = net_.out(l);
            layers_.push_back({take(n), take(n), take(n)});
            if (reverse) kept_.push_back({take(n), take(n), take(n)});
        }
        spare_ = arena_.take((net_.widest() + width<T>) * LANES<T>);
        if (!reverse) return;
        slope_delta_ = take(net_.size), trace_delta_ = take(trace_.rows);
        modulation_delta_ = take(modulation_.rows);
        other_ = arena_.take(net_.widest() * LANES<T>);
        turned_ = arena_.take((net_.widest() + width<T>) * LANES<T> * n_stages);
    }

    // All lanes are computed, however few of them count.
    static int lanes_for(int) { return LANES<T>; }

    // slope = f(x), of (dim, LANES), on (inputs, LANES).
    void evaluate(const T* x, T* slope, int) { run<false>(0, x, slope); }

    // The same; keep what the reverse of this stage needs.
    void linearize(int stage, const T* x, T* slope, int) { run<true>(stage, x, slope); }

    // out (dim, LANES) = (df/dx)^T cotangent at a stage.
    void pullback(int s, const T* cotangent, T* out, int) {
        constexpr int W = width<T>;
        const int64_t end = net_.size * LANES<T>;
        const T* of_change = cotangent + end;
        T *delta = slope_delta_[s], *modulation = modulation_delta_[s];
        T *of_gates = modulation, *of_biases = modulation + net_.n_units * LANES<T>;
        for (int64_t i = 0; i < end; i += W) {
            Vec<T> sum = load(cotangent + i);
            if (net_.n_components)
                sum -= load(of_change + i % LANES<T>) * load(score_[s] + i);
            store(delta + i, sum);
        }
        std::memcpy(modulation + 2 * net_.n_units * LANES<T>, delta, end * sizeof(T));
        multiply(net_.backward[net_.last()], delta, spare_);
        T* of_trace = trace_delta_[s];  // minus the cotangent, times the other factor
        for (int64_t i = 0; i < trace_.rows * LANES<T>; i += W) {
            const Vec<T> minus = -load(of_change + i % LANES<T>);
            store(of_trace + i, net_.hidden == 2 ? minus * load(layers_[1].tangent[s] + i) : minus);
        }
        multiply(net_.backward[net_.kernel()], of_trace, other_);
        for (int64_t l = net_.hidden - 1, row = net_.n_units; l >= 0; --l) {
            row -= net_.out(l);
            const T* gates = modulation_[s] + row * LANES<T>;
            T* to = kept_[l].delta[s];
            for (int64_t i = 0; i < net_.out(l) * LANES<T>; i += W) {
                const Vec<T> gate = load(gates + i), slope = load(kept_[l].slope[s] + i);
                const Vec<T> of_tangent = l ? -load(of_change + i % LANES<T>) * load(trace_[s] + i)
                                            : load(other_ + i);
                const Vec<T> of_z = load(spare_ + i) * slope +
                                    of_tangent * gate * load(kept_[l].bend[s] + i);
                store(of_gates + row * LANES<T> + i,
                      of_tangent * slope + of_z * load(layers_[l].product[s] + i));
                store(of_biases + row * LANES<T> + i, of_z);
                store(to + i, of_z * gate);
            }
            multiply(net_.backward[l], to, l ? spare_ : out);
        }
        for (int64_t i = 0; i < LANES<T>; i += W) store(out + end + i, Vec<T>{});
        if (!net_.n_components) return;
        for (int64_t i = 0; i < end; i += W)
            store(spare_ + i, -load(of_change + i % LANES<T>) * load(slope_[s] + i));
        mixture_.pullback(s, cotangent, spare_, out);
    }

    // Add the parameter gradients of n stages.
    void accumulate(std::vector<LayerSum<T>>& sums, const T*, const T*, int n, int) {
        for (int64_t l = 0; l < net_.hidden; ++l)
            sums[l].add(kept_[l].delta[0], l ? layers_[l - 1].value[0] : y_[0], n, turned_);
        sums[net_.last()].add(slope_delta_[0], layers_.back().value[0], n, turned_);
        sums[net_.kernel()].add(trace_delta_[0], layers_[0].tangent[0], n, turned_);
        sums[net_.modulation()].add(modulation_delta_[0], features_[0], n, turned_);
    }

private:
    // An array of (stages, rows, LANES).
    struct Rows {
        T* memory = nullptr;
        int64_t rows = 0;
        T* operator[](int stage) const { return memory + stage * rows * LANES<T>; }
    };
    // W h, the activation, and its derivative times the gate.
    struct Hidden {
        Rows product, value, tangent;
    };
    // What only the reverse needs: two derivatives, and the cotangent of W h.
    struct Kept {
        Rows slope, bend, delta;
    };

    const FlowNetwork<T>& net_;
    MixtureEvaluator<T> mixture_;
    Arena<T> arena_;
    Rows y_, slope_, score_, features_, modulation_, trace_;
    Rows slope_delta_, trace_delta_, modulation_delta_;
    std::vector<Hidden> layers_;
    std::vector<Kept> kept_;
    T *spare_, *other_ = nullptr, *turned_ = nullptr;
    T modulated_[LANES<T>];  // times of the modulation of stage 0
    bool is_modulated_ = false;

    static void multiply(const Matrix<T>& m, const T* x, T* out) {
        product(m, NO_BIAS<T>, x, out);
    }

    template <bool RECORD>
    void run(int s, const T* x, T* slope) {
        constexpr int W = width<T>;
        const int64_t end = net_.size * LANES<T>;
        const T* time = x + net_.dim * LANES<T>;
        modulate<RECORD>(s, time);
        if (RECORD) std::memcpy(y_[s], x, end * sizeof(T));
        const T* in = x;
        for (int64_t l = 0, row = 0; l < net_.hidden; row += net_.out(l++)) {
            multiply(net_.forward[l], in, layers_[l].product[s]);
            const T* gates = modulation_[s] + row * LANES<T>;
            with_activation(net_.activation, [&](auto activation) {
                activate_layer<decltype(activation)::value, RECORD>(s, l, gates);
            });
            in = layers_[l].value[s];
        }
        multiply(net_.forward[net_.last()], in, slope);
        const T* bias = modulation_[s] + 2 * net_.n_units * LANES<T>;
        for (int64_t i = 0; i < end; i += W) store(slope + i, load(slope + i) + load(bias + i));
        multiply(net_.forward[net_.kernel()], layers_[0].tangent[s], trace_[s]);
        if (net_.n_components) {
            std::memcpy(slope_[s], slope, end * sizeof(T));
            mixture_.evaluate(s, x, time, spare_, score_[s]);
        }
        for (int g = 0; g < LANES<T>; g += W) {
            Vec<T> change{};
            for (int64_t i = g; i < trace_.rows * LANES<T>; i += LANES<T>)
                change -= net_.hidden == 2 ? load(trace_[s] + i) * load(layers_[1].tangent[s] + i)
                                           : load(trace_[s] + i);
            for (int64_t i = g; net_.n_components && i < end; i += LANES<T>) {
                change -= load(slope + i) * load(score_[s] + i);
                store(slope + i, load(slope + i) + load(spare_ + i));
            }
            store(slope + end + g, change);
        }
    }

    template <Activation A, bool RECORD>
    void activate_layer(int s, int64_t l, const T* gates) {
        const Hidden& layer = layers_[l];
        const T* biases = gates + net_.n_units * LANES<T>;
        for (int64_t i = 0; i < net_.out(l) * LANES<T>; i += width<T>) {
            const Vec<T> gate = load(gates + i);
            const Jet<T> a = jet<A, T>(load(layer.product[s] + i) * gate + load(biases + i));
            store(layer.value[s] + i, a.value);
            store(layer.tangent[s] + i, a.slope * gate);
            if (!RECORD) continue;
            store(kept_[l].slope[s] + i, a.slope);
            store(kept_[l].bend[s] + i, a.bend);
        }
    }

    // Gates and biases at times (LANES,), unless they are there already.
    template <bool RECORD>
    void modulate(int s, const T* time) {
        if (!RECORD && is_modulated_ && std::equal(time, time + LANES<T>, modulated_)) return;
        T *t = features_[s], *cosine = t + LANES<T>;
        T* sine = cosine + net_.n_frequencies * LANES<T>;
        for (int l = 0; l < LANES<T>; ++l) {
            t[l] = time[l];
            if (!net_.n_frequencies) continue;
            // the same for most
            const bool again = l && time[l] == time[l - 1];
            cosine[l] = again ? cosine[l - 1] : std::cos(T(3.14159265358979323846) * time[l]);
            sine[l] = again ? sine[l - 1] : std::sin(T(3.14159265358979323846) * time[l]);
        }
        // multiples of the angle, one after the other
        for (int64_t i = LANES<T>; i < net_.n_frequencies * LANES<T>; i += width<T>) {
            const int64_t one = i % LANES<T>, before = i - LANES<T>;
            const Vec<T> c = load(cosine + one), s = load(sine + one);
            store(cosine + i, load(cosine + before) * c - load(sine + before) * s);
            store(sine + i, load(sine + before) * c + load(cosine + before) * s);
        }
        product(net_.forward[net_.modulation()], net_.modulation_bias.data(), t, modulation_[s]);
        std::copy(time, time + LANES<T>, modulated_);
        is_modulated_ = true;
    }
};
