/* Ministral (2410) and Ministral 3 in C99: both text models, with the standard library alone.
 *
 *     cc -O2 -std=c99 -o port examples/port.c -lm
 *     ./port DIR --ids 1,2,3 -o mine.safetensors       all stages, for `python -m reference diff`
 *     ./port DIR --ids 1,2,3 --generate 9              the 9 ids that follow, greedy
 *     ./port DIR --ids 1,2,3 --generate 9 --temperature 0.8 --seed 1
 *
 * DIR holds a config.json of Transformers and one model.safetensors in float32 or bfloat16. Numbers
 * are float32, and tokens are computed one at a time. Generation does not stop at an end token.
 * A tokenizer is out of scope. These lines of Python encode and decode:
 *
 *     python -c "from tokenizer import Tokenizer as T; print(T.from_dir('DIR').encode('To be'))"
 *     python -c "from tokenizer import Tokenizer as T; print(T.from_dir('DIR').decode([1, 2, 3]))"
 *
 * Functions are named after the parts of ministral.py and ministral3.py. Sizes in comments:
 *     E hidden_size   F intermediate_size   V vocab_size   T tokens   D head_dim
 *     H query heads   G key/value heads (H is a multiple of G)
 * The machine must be little-endian, as the files are. Memory is freed when the process ends. */
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

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count + 1, size); /* + 1: text that was read from a file ends with 0 */
    if (memory == NULL) fail("no memory for %zu times %zu bytes", count, size);
    return memory;
}

/* ----------------------------------------------------------------------------------------- files
 * A JSON value is a pointer to its first character. A value that is missing is an empty text. */
static const char *json_space(const char *p) { return p + strspn(p, ", \t\r\n"); }

static int json_is(const char *value, const char *text) {
    return strncmp(value, text, strlen(text)) == 0;
}

/* One past the last character of the value at p. */
static const char *json_end(const char *p) {
    int depth = 0;
    do {
        char first = *p++;
        if (first == '{' || first == '[') depth++;
        else if (first == '}' || first == ']') depth--;
        else if (first == '"') {
            for (; *p != '"' && *p != '\0'; p++)
                if (p[0] == '\\' && p[1] != '\0') p++;
            if (*p++ == '\0') fail("a JSON text has no end");
        } else if (first == '\0') fail("a JSON object has no end");
        else p += strcspn(p, ",:{}[]\" \t\r\n"); /* the rest of a number, true, false, null */
    } while (depth > 0);
    return p;
}

static const char *json_get(const char *object, const char *key) {
    size_t length = strlen(key);
    const char *p = object;
    if (*p == '{') p = json_space(p + 1);
    while (*p == '"') {
        const char *name = p;
        p = json_space(json_end(p));
        if (*p != ':') fail("this is not JSON: %.20s", name);
        p = json_space(p + 1);
        if (strncmp(name + 1, key, length) == 0 && name[length + 1] == '"') return p;
        p = json_space(json_end(p));
    }
    return "";
}

/* The number of a key; if it is missing or null, the default. The default NAN makes that an error. */
static double json_number(const char *object, const char *key, double otherwise) {
    const char *value = json_get(object, key);
    char *end;
    double number = strtod(value, &end);
    if (*value != '\0' && !json_is(value, "null")) {
        if (end != json_end(value)) fail("%s=%.20s is not supported; supported: a number", key, value);
        return number;
    }
    if (isnan(otherwise)) fail("config.json has no %s", key);
    return otherwise;
}

static int json_size(const char *object, const char *key) {
    double number = json_number(object, key, NAN);
    if (!(number >= 1 && number <= INT32_MAX && number == floor(number)))
        fail("%s=%g is not supported; supported: a whole number above 0", key, number);
    return (int)number;
}

/* Refuse a field that is given with another value than the supported one. */
static void expect(const char *object, const char *key, const char *supported) {
    const char *value = json_get(object, key);
    if (*value == '\0' || json_is(value, "null") || json_is(value, supported)) return;
    int length = (int)(json_end(value) - value);
    fail("%s=%.*s is not supported; supported: %s", key, length, value, supported);
}

static char *read_file(const char *directory, const char *name, size_t *size) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) fail("cannot read %s", path);
    *size = (size_t)ftell(file);
    rewind(file);
    char *content = allocate(*size, 1);
    if (fread(content, 1, *size, file) != *size) fail("cannot read %s", path);
    return content;
}

/* A safetensors file: the length of the header (8 bytes), the header (JSON), the numbers. */
typedef struct {
    const char *header, *numbers;
    size_t size; /* of the numbers, in bytes */
} Weights;

static Weights read_weights(const char *directory) {
    size_t size;
    uint64_t length = 0;
    const char *content = read_file(directory, "model.safetensors", &size);
    if (size > 8) memcpy(&length, content, 8);
    if (size <= 8 || length > size - 8) fail("model.safetensors is cut off");
    char *header = memcpy(allocate(length, 1), content + 8, length);
    if (strstr(header, ".bias\"") != NULL) fail("model.safetensors has biases: not supported");
    return (Weights){header, content + 8 + length, size - 8 - length};
}

/* A matrix (rows, columns), or a vector (columns,) if rows is 1, as float32. */
static float *tensor(const Weights *file, int layer, const char *part, int rows, int columns) {
    char name[80];
    snprintf(name, sizeof name, "%s.weight", part);
    if (layer >= 0) snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, part);
    const char *entry = json_get(file->header, name);
    if (*entry == '\0') fail("model.safetensors has no %s", name);
    double shape[2] = {0, 0}, start = -1, end = 0;
    int dimensions = sscanf(json_get(entry, "shape"), "[ %lf , %lf ]", &shape[0], &shape[1]);
    int fits = shape[0] == rows && shape[1] == columns;
    if (dimensions == 1) fits = rows == 1 && shape[0] == columns;
    size_t width = 4, count = (size_t)rows * columns;
    if (json_is(json_get(entry, "dtype"), "\"BF16\"")) width = 2;
    else expect(entry, "dtype", "\"F32\"");
    sscanf(json_get(entry, "data_offsets"), "[ %lf , %lf ]", &start, &end);
    if (!fits || start < 0 || end > file->size || end - start != count * width)
        fail("%s does not have the shape (%d, %d) that config.json says", name, rows, columns);
    float *numbers = allocate(count, sizeof(float));
    const char *source = file->numbers + (size_t)start;
    for (size_t i = 0; i < count; i++) /* a bfloat16 is the upper half of a float32 */
        memcpy((char *)(numbers + i) + 4 - width, source + i * width, width);
    return numbers;
}

/* --------------------------------------------------------------------- configuration and weights */
typedef struct {
    const float *input_layernorm, *q_proj, *k_proj, *v_proj, *o_proj;
    const float *post_attention_layernorm, *gate_proj, *up_proj, *down_proj;
    int window;           /* how many keys a query sees, its own included */
    float *keys, *values; /* cache, (window, G, D): a ring, position p is in slot p % window */
} Layer;

typedef struct {
    char name[48];
    int heads, size;
    float *numbers; /* (T, size), or (heads, T, size) */
} Stage;

typedef struct {
    int hidden_size, intermediate_size, vocab_size, num_hidden_layers;
    int num_attention_heads, num_key_value_heads, head_dim;
    double rms_norm_eps, rope_theta, attention_factor, llama_4_scaling_beta, original_context;
    float *inv_freq; /* (D/2,) radians per position */
    const float *embed_tokens, *norm, *lm_head;
    Layer *layers;
    int tokens, position;          /* how many tokens this run has, and the current one */
    float *scores, *probabilities; /* (H, tokens) */
    Stage *stages, *next_stage;    /* NULL: nothing is recorded */
    char prefix[24];               /* of the names of stages, "layers.0." */
} Model;

/* The pair (a fraction, too) that turns `turns` times within the original context. */
static double ramp_end(const Model *m, double turns) {
    double log_theta = log(m->rope_theta);
    return m->head_dim * log(m->original_context / (turns * 2 * acos(-1))) / (2 * log_theta);
}

/* YaRN: fast pairs keep their frequency, slow ones get 1/factor of it, between them is a ramp. */
static void yarn(Model *m, const char *rope) {
    double factor = json_number(rope, "factor", NAN);
    double low = ramp_end(m, json_number(rope, "beta_fast", 32));
    double high = ramp_end(m, json_number(rope, "beta_slow", 1));
    if (!json_is(json_get(rope, "truncate"), "false")) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0);
    high = fmin(high, m->head_dim - 1);
    if (low == high) high += 0.001;
    for (int i = 0; i < m->head_dim / 2; i++) {
        double slowed = fmin(fmax((i - low) / (high - low), 0), 1);
        m->inv_freq[i] = (float)(m->inv_freq[i] * (1 - slowed + slowed / factor));
    }
    double mscale = json_number(rope, "mscale", 0);
    double mscale_all_dim = json_number(rope, "mscale_all_dim", 0);
    double magnitude = 0.1 * log(factor) + 1;
    if (mscale != 0 && mscale_all_dim != 0) /* they are equal in Ministral 3: 1 */
        magnitude = (0.1 * mscale * log(factor) + 1) / (0.1 * mscale_all_dim * log(factor) + 1);
    m->attention_factor = json_number(rope, "attention_factor", magnitude);
}

/* Constants of the model are computed in double, then the frequencies are rounded to float32. */
static void read_rope_parameters(Model *m, const char *config) {
    const char *rope = json_get(config, "rope_parameters"), *kind = "rope_type";
    if (*rope != '{') rope = json_get(config, "rope_scaling"); /* in older files */
    if (*json_get(rope, kind) == '\0') kind = "type";
    m->rope_theta = json_number(rope, "rope_theta", json_number(config, "rope_theta", 0));
    if (m->rope_theta <= 1) fail("rope_theta is missing, or not above 1");
    m->inv_freq = allocate(m->head_dim / 2, sizeof(float));
    for (int i = 0; i < m->head_dim / 2; i++)
        m->inv_freq[i] = (float)pow(m->rope_theta, -2.0 * i / m->head_dim);
    m->attention_factor = 1;
    m->llama_4_scaling_beta = json_number(rope, "llama_4_scaling_beta", 0);
    int is_yarn = json_is(json_get(rope, kind), "\"yarn\"");
    if (is_yarn || m->llama_4_scaling_beta != 0) {
        expect(config, "model_type", "\"ministral3\"");
        m->original_context = json_size(rope, "original_max_position_embeddings");
    }
    if (is_yarn) yarn(m, rope);
    else expect(rope, kind, "\"default\"");
}

/* The window of every layer. That of a full layer is all tokens of this run. */
static void read_windows(Model *m, const char *config) {
    int window = m->tokens;
    const char *kind = json_get(config, "layer_types"), *name = "sliding_window";
    if (json_number(config, name, 0) != 0) window = (int)fmin(json_size(config, name), m->tokens);
    int all_alike = *kind != '[';
    for (int n = 0; n < m->num_hidden_layers; n++) {
        m->layers[n].window = window;
        if (all_alike) continue;
        kind = json_space(kind + 1);
        if (json_is(kind, "\"full_attention\"")) m->layers[n].window = m->tokens;
        else if (!json_is(kind, "\"sliding_attention\"")) fail("layer_types has %.20s", kind);
        kind = json_end(kind);
    }
}

static void read_layer(Model *m, const Weights *file, int n) {
    int E = m->hidden_size, F = m->intermediate_size, D = m->head_dim;
    int H = m->num_attention_heads, G = m->num_key_value_heads;
    Layer *layer = &m->layers[n];
    layer->input_layernorm = tensor(file, n, "input_layernorm", 1, E);
    layer->q_proj = tensor(file, n, "self_attn.q_proj", H * D, E);
    layer->k_proj = tensor(file, n, "self_attn.k_proj", G * D, E);
    layer->v_proj = tensor(file, n, "self_attn.v_proj", G * D, E);
    layer->o_proj = tensor(file, n, "self_attn.o_proj", E, H * D);
    layer->post_attention_layernorm = tensor(file, n, "post_attention_layernorm", 1, E);
    layer->gate_proj = tensor(file, n, "mlp.gate_proj", F, E);
    layer->up_proj = tensor(file, n, "mlp.up_proj", F, E);
    layer->down_proj = tensor(file, n, "mlp.down_proj", E, F);
    layer->keys = allocate((size_t)layer->window * G * D, sizeof(float));
    layer->values = allocate((size_t)layer->window * G * D, sizeof(float));
}

static Model read_model(const char *directory, int tokens) {
    Model m = {.tokens = tokens};
    size_t size;
    const char *config = json_space(read_file(directory, "config.json", &size));
    if (!json_is(json_get(config, "model_type"), "\"ministral3\""))
        expect(config, "model_type", "\"ministral\"");
    expect(config, "hidden_act", "\"silu\"");
    expect(config, "attention_bias", "false");
    expect(config, "mlp_bias", "false");
    expect(config, "quantization_config", "null");
    m.hidden_size = json_size(config, "hidden_size");
    m.intermediate_size = json_size(config, "intermediate_size");
    m.vocab_size = json_size(config, "vocab_size");
    m.num_hidden_layers = json_size(config, "num_hidden_layers");
    m.num_attention_heads = json_size(config, "num_attention_heads");
    m.num_key_value_heads = json_size(config, "num_key_value_heads");
    m.head_dim = json_size(config, "head_dim");
    m.rms_norm_eps = json_number(config, "rms_norm_eps", NAN);
    if (m.num_attention_heads % m.num_key_value_heads != 0 || m.head_dim % 2 != 0)
        fail("num_key_value_heads must divide num_attention_heads, head_dim must be even");
    read_rope_parameters(&m, config);
    m.layers = allocate(m.num_hidden_layers, sizeof(Layer));
    read_windows(&m, config);

    Weights file = read_weights(directory);
    for (int n = 0; n < m.num_hidden_layers; n++) read_layer(&m, &file, n);
    m.embed_tokens = tensor(&file, -1, "model.embed_tokens", m.vocab_size, m.hidden_size);
    m.norm = tensor(&file, -1, "model.norm", 1, m.hidden_size);
    m.lm_head = m.embed_tokens;
    if (json_is(json_get(config, "tie_word_embeddings"), "false"))
        m.lm_head = tensor(&file, -1, "lm_head", m.vocab_size, m.hidden_size);
    m.scores = allocate((size_t)m.num_attention_heads * tokens, sizeof(float));
    m.probabilities = allocate((size_t)m.num_attention_heads * tokens, sizeof(float));
    return m;
}

/* ------------------------------------------------------------------------------------------ trace */
/* Keep a stage of the current token, under its name in reference/trace.py: (size,) or, of heads,
 * (heads, size). Every token has the same stages in the same order. */
static void record(Model *m, const char *point, int heads, int size, const float *numbers) {
    if (m->stages == NULL) return;
    Stage *stage = m->next_stage++;
    if (m->position == 0) {
        snprintf(stage->name, sizeof stage->name, "%s%s", m->prefix, point);
        stage->heads = heads;
        stage->size = size;
        stage->numbers = allocate((size_t)heads * m->tokens * size, sizeof(float));
    }
    for (int h = 0; h < heads; h++) {
        float *place = stage->numbers + ((size_t)h * m->tokens + m->position) * size;
        memcpy(place, numbers + (size_t)h * size, size * sizeof(float));
    }
}

static void write_trace(const Model *m, const char *path, const int *ids) {
    size_t count = m->next_stage - m->stages, end = (size_t)m->tokens * 4;
    char *header = allocate(count + 2, 200), *p = header;
    p += sprintf(p, "{\"input.input_ids\":{\"dtype\":\"I32\",\"shape\":[1,%d],", m->tokens);
    p += sprintf(p, "\"data_offsets\":[0,%zu]}", end);
    for (const Stage *stage = m->stages; stage < m->next_stage; stage++) {
        size_t start = end;
        end += (size_t)stage->heads * m->tokens * stage->size * 4;
        p += sprintf(p, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[1,", stage->name);
        if (stage->heads > 1) p += sprintf(p, "%d,", stage->heads);
        p += sprintf(p, "%d,%d],\"data_offsets\":[%zu,%zu]}", m->tokens, stage->size, start, end);
    }
    *p++ = '}';
    uint64_t length = p - header;
    FILE *file = fopen(path, "wb");
    if (file == NULL) fail("cannot write %s", path);
    fwrite(&length, 8, 1, file);
    fwrite(header, 1, length, file);
    fwrite(ids, 4, m->tokens, file);
    for (const Stage *stage = m->stages; stage < m->next_stage; stage++)
        fwrite(stage->numbers, 4, (size_t)stage->heads * m->tokens * stage->size, file);
    if (fclose(file) != 0) fail("cannot write %s", path);
}

/* ------------------------------------------------------------------------------------------ model */
static float dot(const float *a, const float *b, int n) {
    float sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* out (rows,) = weight (rows, columns) x (columns,) */
static void linear(float *out, const float *weight, const float *x, int rows, int columns) {
    for (int i = 0; i < rows; i++) out[i] = dot(weight + (size_t)i * columns, x, columns);
}

/* out = x / sqrt(mean(x^2) + eps) * weight, each (E,) */
static void rms_norm(const Model *m, float *out, const float *x, const float *weight) {
    int E = m->hidden_size;
    float scale = 1 / sqrtf(dot(x, x, E) / E + (float)m->rms_norm_eps);
    for (int i = 0; i < E; i++) out[i] = x[i] * scale * weight[i];
}

/* Rotate the heads x (heads, D) to the current position: pair i of a head is (x[i], x[i + D/2]). */
static void apply_rotary_pos_emb(const Model *m, float *x, int heads) {
    int half = m->head_dim / 2;
    for (int i = 0; i < half; i++) {
        float angle = m->position * m->inv_freq[i];
        float cosine = cosf(angle) * (float)m->attention_factor;
        float sine = sinf(angle) * (float)m->attention_factor;
        for (int h = 0; h < heads; h++) {
            float *head = x + h * m->head_dim;
            float a = head[i], b = head[i + half];
            head[i] = a * cosine - b * sine;
            head[i + half] = b * cosine + a * sine;
        }
    }
}

/* 1 below the original context, then growing with the position as in Llama 4. */
static float query_scale(const Model *m) {
    if (m->llama_4_scaling_beta == 0) return 1;
    double contexts = floor(m->position / m->original_context);
    return (float)(1 + m->llama_4_scaling_beta * log(1 + contexts));
}

/* What one query head (D,) reads from key head g of the cache: out (D,). */
static void attend(Model *m, const Layer *layer, int h, const float *query, float *out) {
    int G = m->num_key_value_heads, D = m->head_dim, T = m->tokens;
    int g = h / (m->num_attention_heads / G); /* neighbouring query heads share a key head */
    int first = m->position - layer->window + 1;
    if (first < 0) first = 0;
    float *scores = m->scores + (size_t)h * T, *probabilities = m->probabilities + (size_t)h * T;
    float largest = -INFINITY, sum = 0;
    for (int t = 0; t < T; t++) scores[t] = -INFINITY; /* hidden keys */
    for (int t = first; t <= m->position; t++) {
        const float *key = layer->keys + ((size_t)(t % layer->window) * G + g) * D;
        scores[t] = dot(query, key, D) / sqrtf((float)D);
        largest = fmaxf(largest, scores[t]);
    }
    for (int t = 0; t < T; t++) sum += probabilities[t] = expf(scores[t] - largest);
    for (int t = 0; t < T; t++) probabilities[t] /= sum;
    for (int i = 0; i < D; i++) out[i] = 0;
    for (int t = first; t <= m->position; t++) {
        const float *value = layer->values + ((size_t)(t % layer->window) * G + g) * D;
        for (int i = 0; i < D; i++) out[i] += probabilities[t] * value[i];
    }
}

/* Grouped-query attention of the current token: x (E,) -> out (E,). */
static void attention(Model *m, const Layer *layer, const float *x, float *out) {
    int E = m->hidden_size, H = m->num_attention_heads, G = m->num_key_value_heads;
    int D = m->head_dim, T = m->tokens;
    float q[H * D], k[G * D], v[G * D], heads[H * D];
    linear(q, layer->q_proj, x, H * D, E);
    linear(k, layer->k_proj, x, G * D, E);
    linear(v, layer->v_proj, x, G * D, E);
    record(m, "attention.q", H, D, q);
    record(m, "attention.k", G, D, k);
    record(m, "attention.v", G, D, v);
    apply_rotary_pos_emb(m, q, H);
    apply_rotary_pos_emb(m, k, G);
    record(m, "attention.q_rotated", H, D, q);
    record(m, "attention.k_rotated", G, D, k);
    for (int i = 0; i < H * D; i++) q[i] *= query_scale(m);
    record(m, "attention.q_scaled", H, D, q);

    size_t slot = m->position % layer->window; /* overwrites the key that just left the window */
    memcpy(layer->keys + slot * G * D, k, sizeof k);
    memcpy(layer->values + slot * G * D, v, sizeof v);
    for (int h = 0; h < H; h++) attend(m, layer, h, q + h * D, heads + h * D);
    record(m, "attention.scores", H, T, m->scores);
    record(m, "attention.probabilities", H, T, m->probabilities);
    record(m, "attention.heads", 1, H * D, heads);
    linear(out, layer->o_proj, heads, E, H * D);
    record(m, "attention.output", 1, E, out);
}

/* SwiGLU: down(silu(gate(x)) * up(x)), x (E,) -> out (E,). */
static void mlp(Model *m, const Layer *layer, const float *x, float *out) {
    int E = m->hidden_size, F = m->intermediate_size;
    float gate[F], up[F];
    linear(gate, layer->gate_proj, x, F, E);
    linear(up, layer->up_proj, x, F, E);
    record(m, "mlp.gate", 1, F, gate);
    record(m, "mlp.up", 1, F, up);
    for (int i = 0; i < F; i++) gate[i] /= 1 + expf(-gate[i]);
    record(m, "mlp.activation", 1, F, gate);
    for (int i = 0; i < F; i++) gate[i] *= up[i];
    record(m, "mlp.product", 1, F, gate);
    linear(out, layer->down_proj, gate, E, F);
    record(m, "mlp.down", 1, E, out);
}

/* Attention, then MLP. Each adds its result to the residual stream x (E,). */
static void decoder_layer(Model *m, const Layer *layer, float *x) {
    int E = m->hidden_size;
    float normed[E], result[E];
    rms_norm(m, normed, x, layer->input_layernorm);
    record(m, "input_norm", 1, E, normed);
    attention(m, layer, normed, result);
    for (int i = 0; i < E; i++) x[i] += result[i];
    record(m, "attention_residual", 1, E, x);
    rms_norm(m, normed, x, layer->post_attention_layernorm);
    record(m, "post_attention_norm", 1, E, normed);
    mlp(m, layer, normed, result);
    for (int i = 0; i < E; i++) x[i] += result[i];
    record(m, "mlp_residual", 1, E, x);
}

/* The logits (V,) of the token after `id`, which is at `position`. Positions come in order. */
static void forward(Model *m, int id, int position, float *logits) {
    int E = m->hidden_size;
    float x[E], normed[E];
    m->position = position;
    m->next_stage = m->stages;
    m->prefix[0] = '\0';
    memcpy(x, m->embed_tokens + (size_t)id * E, sizeof x);
    record(m, "embedding", 1, E, x);
    for (int n = 0; n < m->num_hidden_layers; n++) {
        snprintf(m->prefix, sizeof m->prefix, "layers.%d.", n);
        decoder_layer(m, &m->layers[n], x);
    }
    m->prefix[0] = '\0';
    rms_norm(m, normed, x, m->norm);
    record(m, "final_norm", 1, E, normed);
    linear(logits, m->lm_head, normed, m->vocab_size, E);
    record(m, "logits", 1, m->vocab_size, logits);
}

/* ------------------------------------------------------------------------------------- generation */
/* SplitMix64 (Steele, Lea, Flood 2014): a counter, whose bits are mixed. Returns 0 to below 1. */
static double random_number(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return (double)((z ^ z >> 31) >> 11) / 9007199254740992.0; /* 2^53 */
}

/* An id drawn from softmax(logits / temperature); temperature 0 is the largest logit. */
static int sample(const float *logits, int V, double temperature, uint64_t *state) {
    int best = 0;
    double sum = 0;
    for (int i = 1; i < V; i++)
        if (logits[i] > logits[best]) best = i;
    if (temperature == 0) return best;
    for (int i = 0; i < V; i++) sum += exp((logits[i] - logits[best]) / temperature);
    double left = random_number(state) * sum;
    for (int i = 0; i < V; i++) {
        left -= exp((logits[i] - logits[best]) / temperature);
        if (left < 0) return i;
    }
    return best;
}

/* The numbers of "1,2,3" are written to ids, in which there is room. Returns how many. */
static int parse_ids(const char *text, int *ids) {
    int count = 0;
    for (const char *p = text; ; p++) {
        char *end;
        ids[count++] = (int)strtol(p, &end, 10);
        if (end == p || (*end != ',' && *end != '\0')) fail("--ids %s: allowed are numbers as 1,2,3", text);
        p = end;
        if (*p == '\0') return count;
    }
}

static double number(const char *option, const char *text, double most) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || !(value >= 0 && value <= most))
        fail("%s %s is not supported; supported: a number from 0 to %g", option, text, most);
    return value;
}

int main(int argc, char **argv) {
    const char *ids_text = NULL, *output = NULL;
    double generate = 0, temperature = 0;
    uint64_t state = 0;
    for (int i = 2; i < argc; i += 2) {
        const char *option = argv[i], *value = argv[i + 1];
        if (value == NULL) fail("%s needs a value", option);
        if (strcmp(option, "--ids") == 0) ids_text = value;
        else if (strcmp(option, "-o") == 0) output = value;
        else if (strcmp(option, "--generate") == 0) generate = number(option, value, 1e6);
        else if (strcmp(option, "--temperature") == 0) temperature = number(option, value, 1e6);
        else if (strcmp(option, "--seed") == 0) state = (uint64_t)number(option, value, 1e15);
        else fail("unknown option %s", option);
    }
    if (ids_text == NULL || (output == NULL) == (generate == 0))
        fail("usage: port DIR --ids 1,2,3 and either -o FILE or --generate N "
             "[--temperature T] [--seed S]");
    int *ids = allocate(strlen(ids_text) + generate, sizeof(int));
    int given = parse_ids(ids_text, ids), tokens = given + (int)generate;
    Model m = read_model(argv[1], tokens);
    for (int i = 0; i < given; i++)
        if (ids[i] < 0 || ids[i] >= m.vocab_size)
            fail("id %d is not in the vocabulary; allowed: 0 to %d", ids[i], m.vocab_size - 1);
    if (output != NULL) m.stages = allocate(m.num_hidden_layers * 20 + 3, sizeof(Stage));
    float *logits = allocate(m.vocab_size, sizeof(float));
    for (int i = 0; i < tokens; i++) {
        forward(&m, ids[i], i, logits);
        if (i >= given - 1 && i + 1 < tokens) ids[i + 1] = sample(logits, m.vocab_size, temperature, &state);
    }
    if (output != NULL) write_trace(&m, output, ids);
    for (int i = given; i < tokens; i++) printf("%d%c", ids[i], i + 1 < tokens ? ',' : '\n');
    return 0;
}
