/* Ministral (2410) and Ministral 3 in C99: both text models, with the standard library alone.
 *
 *     cc -O2 -std=c99 -o port examples/port.c -lm
 *     ./port DIR --ids 1,2,3 -o mine.safetensors     all stages, for `python -m reference diff`
 *     ./port DIR --ids 1,2,3 --generate 9 [--temperature 0.8 --seed 1]     9 more ids; or greedy
 * DIR holds Transformers' config.json and one model.safetensors in float32 or bfloat16. Functions
 * have the names of ministral.py and ministral3.py. Numbers are float32, tokens are computed one at
 * a time, generation does not stop at an end token, and the machine must be little-endian. The
 * tokenizer is out of scope. In Python, this encodes a text, and decode([1, 2, 3]) is the way back:
 *     python -c "from tokenizer import Tokenizer as T; print(T.from_dir('DIR').encode('To be'))" */
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("port: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(2);
}

static void *allocate(size_t count, size_t size) { /* zeros */
    void *memory = calloc(count, size);
    if (memory == NULL) fail("no memory for %zu times %zu bytes", count, size);
    return memory;
}

/* What follows a key in JSON, or "". These files have each key once: nesting does not matter. */
static const char *json_get(const char *json, const char *key) {
    size_t length = strlen(key);
    for (const char *p = strstr(json, key); p != NULL; p = strstr(p + 1, key)) {
        const char *colon = p + length + 1 + strspn(p + length + 1, " \t\r\n");
        if (p > json && p[-1] == '"' && p[length] == '"' && *colon == ':')
            return colon + 1 + strspn(colon + 1, " \t\r\n");
    }
    return "";
}

static int json_is(const char *p, const char *text) { return strncmp(p, text, strlen(text)) == 0; }
/* Refuse a value that is given and is not the supported one. */
static void expect(const char *json, const char *key, const char *supported) {
    const char *value = json_get(json, key);
    if (*value == '\0' || json_is(value, "null") || json_is(value, supported)) return;
    int length = (int)strcspn(value, ",]}\r\n");
    fail("%s=%.*s is not supported; supported: %s", key, length, value, supported);
}

/* The number of a key, or `otherwise` if it is missing or null; NAN makes that an error. */
static double json_number(const char *json, const char *key, double otherwise) {
    const char *value = json_get(json, key);
    char *end;
    double number = strtod(value, &end);
    if (end > value && strchr(",} \t\r\n", *end) != NULL) return number;
    expect(json, key, "a number");
    if (isnan(otherwise)) fail("config.json has no %s", key);
    return otherwise;
}

static int json_size(const char *json, const char *key) {
    double number = json_number(json, key, NAN);
    if (number < 1 || number > 1e9 || number != floor(number)) expect(json, key, "sizes above 0");
    return (int)number;
}

typedef struct {
    float *input_layernorm, *q_proj, *k_proj, *v_proj, *o_proj; /* matrices are (out, in) */
    float *post_attention_layernorm, *gate_proj, *up_proj, *down_proj;
    int window;           /* how many keys a query sees, its own included */
    float *keys, *values; /* cache, (window, G, D): a ring, position p is in slot p % window */
} Layer;

typedef struct {
    int E, F, V, L;         /* hidden_size, intermediate_size, vocab_size, num_hidden_layers */
    int H, G, D;            /* query heads, key/value heads, the size of a head */
    int T, position, layer; /* tokens of this run; the current position, and layer, or -1 */
    double rms_norm_eps, attention_factor, llama_4_scaling_beta, original_context;
    float *embed_tokens, *norm, *lm_head, *inv_freq; /* inv_freq: (D/2,) radians per position */
    Layer *layers;
    const char *header, *numbers; /* safetensors: header length (8 bytes), header (JSON), numbers */
    uint64_t numbers_size;
    char *trace_header; /* of the trace; NULL: nothing is recorded */
    float *trace;
    size_t trace_size; /* in numbers, up to the current stage */
} Model;

static char *read_file(const char *directory, const char *name, uint64_t *size) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) fail("cannot read %s", path);
    *size = (uint64_t)ftell(file);
    rewind(file);
    char *content = allocate(*size + 9, 1); /* it ends with 0, as a text */
    if (fread(content, 1, *size, file) != *size) fail("cannot read %s", path);
    return content;
}

/* A matrix (rows, columns), or a vector (columns,) if rows is 1, as float32. Layer -1: of none. */
static float *tensor(const Model *m, int layer, const char *part, int rows, int columns) {
    char name[80];
    snprintf(name, sizeof name, "%s.weight", part);
    if (layer >= 0) snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, part);
    const char *entry = json_get(m->header, name), *dtype = json_get(entry, "dtype");
    if (*entry == '\0') fail("model.safetensors has no %s", name);
    double a = 0, b = 0, start = -1, end = 0;
    if (sscanf(json_get(entry, "shape"), "[ %lf , %lf ]", &a, &b) == 1) b = a, a = 1;
    sscanf(json_get(entry, "data_offsets"), "[ %lf , %lf ]", &start, &end);
    size_t width = 4, count = (size_t)rows * columns;
    if (json_is(dtype, "\"BF16\"")) width = 2;
    else if (!json_is(dtype, "\"F32\"")) fail("%s is %.6s; supported: F32, BF16", name, dtype);
    int is_cut_off = start < 0 || end - start != count * width || end > m->numbers_size;
    if (a != rows || b != columns || is_cut_off)
        fail("%s is cut off, or not (%d, %d), as config.json says", name, rows, columns);
    const char *source = m->numbers + (size_t)start;
    float *numbers = allocate(count, sizeof(float));
    for (size_t i = 0; i < count; i++) /* a bfloat16 is the upper half of a float32 */
        memcpy((char *)(numbers + i) + 4 - width, source + i * width, width);
    return numbers;
}

static void read_rope_parameters(Model *m, const char *config) {
    double theta = json_number(config, "rope_theta", NAN);
    m->inv_freq = allocate(m->D / 2, sizeof(float));
    for (int i = 0; i < m->D / 2; i++) m->inv_freq[i] = (float)pow(theta, -2.0 * i / m->D);
    m->llama_4_scaling_beta = json_number(config, "llama_4_scaling_beta", 0);
    int is_yarn = json_is(json_get(config, "rope_type"), "\"yarn\"");
    if (is_yarn || m->llama_4_scaling_beta != 0) {
        expect(config, "model_type", "\"ministral3\"");
        m->original_context = json_size(config, "original_max_position_embeddings");
    }
    if (!is_yarn) expect(config, "rope_type", "\"default\""), expect(config, "type", "\"default\"");
    if (!is_yarn) return;
    /* YaRN: fast pairs keep their frequency, slow ones get 1/factor of it, with a ramp between. */
    double factor = json_number(config, "factor", NAN), pairs = m->D / (2 * log(theta));
    double turns = m->original_context / (2 * acos(-1));
    double low = pairs * log(turns / json_number(config, "beta_fast", 32));
    double high = pairs * log(turns / json_number(config, "beta_slow", 1));
    if (!json_is(json_get(config, "truncate"), "false")) low = floor(low), high = ceil(high);
    low = fmax(low, 0), high = fmin(high, m->D - 1);
    if (low == high) high += 0.001;
    for (int i = 0; i < m->D / 2; i++) {
        double slowed = fmin(fmax((i - low) / (high - low), 0), 1);
        m->inv_freq[i] *= (float)(1 - slowed + slowed / factor);
    }
    double a = json_number(config, "mscale", 0), b = json_number(config, "mscale_all_dim", 0);
    double quotient = (0.1 * a * log(factor) + 1) / (0.1 * b * log(factor) + 1);
    if (a == 0 || b == 0) quotient = 0.1 * log(factor) + 1; /* not Ministral 3, which has 1 and 1 */
    m->attention_factor = json_number(config, "attention_factor", quotient);
}

/* The weights and the cache of layer n, whose kind is "full_attention" or "sliding_attention". */
static void read_layer(Model *m, int n, const char *kind, double sliding_window) {
    int E = m->E, F = m->F, Q = m->H * m->D, K = m->G * m->D;
    Layer *layer = &m->layers[n];
    layer->window = (int)fmin(m->T, sliding_window);
    if (json_is(kind, "\"full_attention\"")) layer->window = m->T;
    else if (!json_is(kind, "\"sliding_attention\"")) fail("layer_types: %.20s", kind);
    if (layer->window < 1) fail("sliding_window=%g; supported: 1 and above", sliding_window);
    layer->keys = allocate((size_t)layer->window * K * 2, sizeof(float));
    layer->values = layer->keys + (size_t)layer->window * K;
    layer->input_layernorm = tensor(m, n, "input_layernorm", 1, E);
    layer->q_proj = tensor(m, n, "self_attn.q_proj", Q, E);
    layer->k_proj = tensor(m, n, "self_attn.k_proj", K, E);
    layer->v_proj = tensor(m, n, "self_attn.v_proj", K, E);
    layer->o_proj = tensor(m, n, "self_attn.o_proj", E, Q);
    layer->post_attention_layernorm = tensor(m, n, "post_attention_layernorm", 1, E);
    layer->gate_proj = tensor(m, n, "mlp.gate_proj", F, E);
    layer->up_proj = tensor(m, n, "mlp.up_proj", F, E);
    layer->down_proj = tensor(m, n, "mlp.down_proj", E, F);
}

static Model read_model(const char *directory, int tokens) {
    uint64_t size, header_size;
    const char *config = read_file(directory, "config.json", &size);
    if (!json_is(json_get(config, "model_type"), "\"ministral3\""))
        expect(config, "model_type", "\"ministral\"");
    expect(config, "hidden_act", "\"silu\"");
    expect(config, "attention_bias", "false"), expect(config, "mlp_bias", "false");
    Model m = {.T = tokens,
        .E = json_size(config, "hidden_size"), .F = json_size(config, "intermediate_size"),
        .V = json_size(config, "vocab_size"), .L = json_size(config, "num_hidden_layers"),
        .H = json_size(config, "num_attention_heads"), .D = json_size(config, "head_dim"),
        .G = json_size(config, "num_key_value_heads"), .layer = -1, .attention_factor = 1,
        .rms_norm_eps = json_number(config, "rms_norm_eps", NAN), .original_context = INFINITY,
    };
    if (m.H % m.G != 0 || m.D % 2 != 0) fail("%d heads, %d key heads of size %d", m.H, m.G, m.D);
    read_rope_parameters(&m, config);
    m.header = read_file(directory, "model.safetensors", &size) + 8;
    memcpy(&header_size, m.header - 8, 8);
    if (size < 8 || header_size > size - 8) fail("model.safetensors is cut off");
    if (strstr(m.header, ".bias\"") != NULL) fail("biases in model.safetensors are not supported");
    m.numbers = m.header + header_size, m.numbers_size = size - 8 - header_size;
    m.layers = allocate(m.L, sizeof(Layer));
    const char *kind = json_get(config, "layer_types"), *next = kind;
    for (int n = 0; n < m.L; n++) {
        if (*kind == '[') next += 1 + strcspn(next + 1, "\"]"); /* a name, or the end */
        else next = "\"sliding_attention\""; /* without a list, all layers slide */
        read_layer(&m, n, next, json_number(config, "sliding_window", m.T));
        if (*kind == '[') next += 1 + strcspn(next + 1, "\"");
    }
    m.norm = tensor(&m, -1, "model.norm", 1, m.E);
    m.embed_tokens = m.lm_head = tensor(&m, -1, "model.embed_tokens", m.V, m.E);
    if (!json_is(json_get(config, "tie_word_embeddings"), "true"))
        m.lm_head = tensor(&m, -1, "lm_head", m.V, m.E);
    return m;
}

/* Keep a stage (size,) of this token for the trace, (1, T, size), named by reference/trace.py. */
static void record(Model *m, const char *point, int size, const float *numbers) {
    size_t start = m->trace_size;
    if (m->trace_header == NULL) return;
    m->trace_size += (size_t)m->T * size;
    if (m->position == 0) { /* every token has the same stages */
        char prefix[24] = "", *end = m->trace_header + strlen(m->trace_header);
        if (m->layer >= 0) snprintf(prefix, sizeof prefix, "layers.%d.", m->layer);
        sprintf(end, ",\"%s%s\":{\"dtype\":\"F32\",\"shape\":[1,%d,%d],\"data_offsets\":[%zu,%zu]}",
                prefix, point, m->T, size, 4 * start, 4 * m->trace_size);
        if ((m->trace = realloc(m->trace, 4 * m->trace_size)) == NULL) fail("no memory left");
    }
    memcpy(m->trace + start + (size_t)m->position * size, numbers, 4 * (size_t)size);
}

static void write_trace(Model *m, const char *path) {
    FILE *file = fopen(path, "wb");
    m->trace_header[0] = '{'; /* in the place of the first comma */
    uint64_t length = strlen(strcat(m->trace_header, "}"));
    if (file == NULL || fwrite(&length, 8, 1, file) != 1) fail("cannot write %s", path);
    fwrite(m->trace_header, 1, length, file);
    fwrite(m->trace, 4, m->trace_size, file);
    if (ferror(file) || fclose(file) != 0) fail("cannot write %s", path);
}

static float dot(const float *a, const float *b, int n) {
    float sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* out (rows,) = w (rows, cols) x (cols,) */
static void linear(Model *m, const char *name, float *out, float *w, float *x, int rows, int cols) {
    for (int i = 0; i < rows; i++) out[i] = dot(w + (size_t)i * cols, x, cols);
    record(m, name, rows, out);
}

/* out = x / sqrt(mean(x^2) + eps) * weight, each (E,) */
static void rms_norm(Model *m, const char *stage, float *out, const float *weight, const float *x) {
    float scale = 1 / sqrtf(dot(x, x, m->E) / m->E + (float)m->rms_norm_eps);
    for (int i = 0; i < m->E; i++) out[i] = x[i] * scale * weight[i];
    record(m, stage, m->E, out);
}

/* Rotate x (heads, D) to the current position. Pair i of a head is its numbers i and i + D/2. */
static void apply_rotary_pos_emb(Model *m, const char *stage, float *x, int heads) {
    int half = m->D / 2;
    for (int i = 0; i < half; i++) {
        float angle = m->position * m->inv_freq[i], factor = (float)m->attention_factor;
        float cosine = cosf(angle) * factor, sine = sinf(angle) * factor;
        for (float *pair = x + i; pair < x + heads * m->D; pair += m->D) {
            float a = pair[0], b = pair[half];
            pair[0] = a * cosine - b * sine;
            pair[half] = b * cosine + a * sine;
        }
    }
    record(m, stage, heads * m->D, x);
}

/* x (E,) -> out (E,), through queries and heads (H, D), scores and probabilities (H, T). */
static void attention(Model *m, const Layer *layer, float *x, float *out) {
    int D = m->D, T = m->T, Q = m->H * D, K = m->G * D, window = layer->window, last = m->position;
    int first = (int)fmax(0, last - window + 1); /* the first visible key */
    size_t slot = (size_t)(last % window) * K; /* overwrites the key that has left the window */
    float q[Q], *k = layer->keys + slot, *v = layer->values + slot;
    linear(m, "attention.q", q, layer->q_proj, x, Q, m->E);
    linear(m, "attention.k", k, layer->k_proj, x, K, m->E);
    linear(m, "attention.v", v, layer->v_proj, x, K, m->E);
    apply_rotary_pos_emb(m, "attention.q_rotated", q, m->H);
    apply_rotary_pos_emb(m, "attention.k_rotated", k, m->G);
    double scale = 1 + m->llama_4_scaling_beta * log(1 + floor(last / m->original_context));
    for (int i = 0; i < Q; i++) q[i] *= (float)scale;
    record(m, "attention.q_scaled", Q, q);
    float *scores = allocate((size_t)m->H * T * 2 + Q, sizeof(float)); /* 0 for hidden keys */
    float *probs = scores + (size_t)m->H * T, *heads = probs + (size_t)m->H * T;
    for (int h = 0; h < m->H; h++) {
        float largest = -INFINITY, sum = 0, *s = scores + (size_t)h * T, *p = probs + (size_t)h * T;
        int g = h / (m->H / m->G) * D; /* neighbouring query heads share a key head */
        for (int t = first; t <= last; t++) {
            s[t] = dot(q + h * D, layer->keys + (size_t)(t % window) * K + g, D) / sqrtf((float)D);
            largest = fmaxf(largest, s[t]);
        }
        for (int t = first; t <= last; t++) sum += p[t] = expf(s[t] - largest);
        for (int t = first; t <= last; t++) {
            const float *value = layer->values + (size_t)(t % window) * K + g;
            p[t] /= sum;
            for (int i = 0; i < D; i++) heads[h * D + i] += p[t] * value[i];
        }
    }
    record(m, "attention.scores", m->H * T, scores);
    record(m, "attention.probabilities", m->H * T, probs);
    record(m, "attention.heads", Q, heads);
    linear(m, "attention.output", out, layer->o_proj, heads, m->E, Q);
    free(scores);
}

/* Attention, then the MLP down(silu(gate(x)) * up(x)), each added to the residual stream x (E,). */
static void decoder_layer(Model *m, const Layer *layer, float *x) {
    float normed[m->E], result[m->E], gate[m->F], up[m->F];
    rms_norm(m, "input_norm", normed, layer->input_layernorm, x);
    attention(m, layer, normed, result);
    for (int i = 0; i < m->E; i++) x[i] += result[i];
    record(m, "attention_residual", m->E, x);
    rms_norm(m, "post_attention_norm", normed, layer->post_attention_layernorm, x);
    linear(m, "mlp.gate", gate, layer->gate_proj, normed, m->F, m->E);
    linear(m, "mlp.up", up, layer->up_proj, normed, m->F, m->E);
    for (int i = 0; i < m->F; i++) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    record(m, "mlp.product", m->F, gate);
    linear(m, "mlp.down", result, layer->down_proj, gate, m->E, m->F);
    for (int i = 0; i < m->E; i++) x[i] += result[i];
    record(m, "mlp_residual", m->E, x);
}

/* The logits (V,) of the token after `id`, which is at `position`: 0, 1, 2, ..., one per call. */
static void forward(Model *m, int id, int position, float *logits) {
    float x[m->E], normed[m->E];
    m->position = position, m->trace_size = 0;
    memcpy(x, m->embed_tokens + (size_t)id * m->E, sizeof x);
    record(m, "embedding", m->E, x);
    for (m->layer = 0; m->layer < m->L; m->layer++) decoder_layer(m, &m->layers[m->layer], x);
    m->layer = -1;
    rms_norm(m, "final_norm", normed, m->norm, x);
    linear(m, "logits", logits, m->lm_head, normed, m->V, m->E);
}

/* From 0 to below 1, by SplitMix64 (Steele, Lea, Flood 2014): the bits of a counter, mixed. */
static double random_number(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return (double)((z ^ z >> 31) >> 11) / 9007199254740992.0; /* 53 bits / 2^53 */
}

/* The id of the largest logit. Gumbel noise makes it a draw from softmax(logits / temperature). */
static int sample(const float *logits, int V, double temperature, uint64_t *state) {
    int best = 0;
    double largest = -INFINITY;
    for (int i = 0; i < V; i++) {
        double value = logits[i];
        if (temperature > 0) value = value / temperature - log(-log(random_number(state)));
        if (value > largest) largest = value, best = i;
    }
    return best;
}

/* The number at *text, from 0 to `most`; *text moves behind it and behind a comma. */
static double argument(const char *option, const char **text, double most) {
    char *end;
    double number = strtod(*text, &end);
    int is_list = strcmp(option, "--ids") == 0, has_end = *end == '\0' || (is_list && *end == ',');
    int is_whole = number == floor(number) || strcmp(option, "--temperature") == 0;
    if (end == *text || !has_end || !is_whole || !(number >= 0 && number <= most))
        fail("%s %.40s is not supported; supported: from 0 to %.0f", option, *text, most);
    *text = end + (*end == ',');
    return number;
}

int main(int argc, char **argv) {
    const char *ids = NULL, *output = NULL;
    double generate = 0, temperature = 0;
    uint64_t seed = 0;
    for (int i = 2; i + 1 < argc; i += 2) {
        const char *option = argv[i], *value = argv[i + 1];
        if (strcmp(option, "--ids") == 0) ids = value;
        else if (strcmp(option, "-o") == 0) output = value;
        else if (strcmp(option, "--generate") == 0) generate = argument(option, &value, 1e6);
        else if (strcmp(option, "--temperature") == 0) temperature = argument(option, &value, 100);
        else if (strcmp(option, "--seed") == 0) seed = (uint64_t)argument(option, &value, 1e15);
        else fail("%s is no option", option);
    }
    if (argc < 2 || argc % 2 != 0 || ids == NULL || (output == NULL) == (generate < 1))
        fail("usage: port DIR --ids 1,2,3 (-o FILE | --generate N [--temperature T] [--seed S])");
    int id = 0, given = 1;
    for (const char *p = ids; *p != '\0'; p++) given += *p == ',';
    int tokens = given + (int)fmax(0, generate - 1);
    Model m = read_model(argv[1], tokens);
    if (output != NULL) m.trace_header = allocate(20 * ((size_t)m.L + 1), 200);
    float *logits = allocate(m.V, sizeof(float));
    for (int i = 0; i < tokens; i++) {
        if (i < given) id = (int)argument("--ids", &ids, m.V - 1);
        forward(&m, id, i, logits);
        if (output != NULL || i + 1 < given) continue;
        id = sample(logits, m.V, temperature, &seed);
        printf("%d\n", id);
    }
    if (output != NULL) write_trace(&m, output);
    return 0;
}
