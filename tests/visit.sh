#!/usr/bin/env bash
# All that is owed on two GPUs, in one visit. Run where vLLM is importable: tests/visit.sh MODEL OUT PART...
#   MODEL: a folder with Qwen3-30B-A3B's config.json. OUT gets JSON, pictures and logs. Parts, with seconds on two H100s:
#   before (155)  layers (40)  steps (200)  decode (150)  prefill (200)  serve (500)  unequal (260)  tests (460)  sanitize (500)
#   logits (110)  soak (560)  formats (350 a model)  backends (300)  ceiling (200)  residents (500)
# DECODE_MODES, PREFILL_MODES and SERVE_MODES name the bench's modes for these parts, LOADS the servers' loads, SWEEP one whose rates serve finds
# beside them, SERVE_ARGS further arguments of theirs, STEP_MODES the modes whose steps are timed, ENGINE (JSON) arguments of their
# engines, LAYERS the layers of all models but servers', STEPS the tokens a step of prefill, PROMPTS how many prompts, RATIO how unequal,
# FORMATS the models of tests/true_shapes.py that formats goes through, BACKENDS vLLM's all2all backends, else all that can run.
# VISIT_CPU=1 goes through the same steps with a tiny model on CPU.
set -u
model=$1 out=$2 failed=0; shift 2
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
export PYTHONPATH="${PYTHONPATH:-}:$here"
bench="python3 -P -m vllm_dwdp.entrypoints.cli bench --model $model --load-format dummy"
serving="python3 -P -m vllm_dwdp.entrypoints.cli bench --serve --model $model"
remote_gib=0.5625  # of a layer's experts of MODEL, on each of two ranks
depth=${LAYERS:-12} layers="{\"num_hidden_layers\": ${LAYERS:-12}}"
engine='{"kv_cache_memory_bytes": 3221225472}'
serve='--load-format dummy --gpu-memory-utilization 0.45 --kv-cache-memory-bytes 8589934592 --hf-overrides {\"num_hidden_layers\":24}'
lengths=256,512,1024,2048,4096,8192
# Two modes of the whole model fit two H100 with few graphs, a KV cache for one prompt, and no 4 GiB for 32 parts of its attention.
whole='{"cudagraph_capture_sizes": [1,2,4,8,256,512,1024,2048,4096,8192], "kv_cache_memory_bytes": 872415232,
  "attention_config": {"flash_attn_max_num_splits_for_cuda_graph": 4}}'
rival=ep batches=1,4,16,32,64,128 few=1,16,64 steps=${STEPS:-16384,8192} prompts=${PROMPTS:-16} minutes=9
saturated=2048:256:inf:256,8192:64:inf:128,8192:1:inf:160 chats=512:256:8:80,512:256:2:20
prompts_alone=512:1:2:8,1024:1:2:8,2048:1:2:8,4096:1:2:8,8192:1:2:8,16384:1:1:6  # TTFT at a quiet server
loads=${LOADS:-$saturated,$prompts_alone,2048:256:24:200,2048:256:16:160,2048:256:8:80,8192:64:12:100,8192:64:8:80,8192:64:4:40,$chats}
unequal=8192:1:inf:64@0+512:256:2:16@1,8192:64:2:16@0+512:256:4:32@1
if [ -n "${VISIT_CPU:-}" ]; then
  layers='{}' engine='{"kv_cache_memory_bytes": 67108864, "max_num_seqs": 8}'
  serve='--load-format dummy --kv-cache-memory-bytes 67108864 --dtype float32 --enforce-eager --max-model-len 200'
  lengths=32,64 rival=tp remote_gib=0.0001 batches=1,2 few=1,2 steps=256 prompts=3 minutes=6 loads=20:8:inf:6 unequal=100:1:inf:4@0+20:8:4:4@1
fi
for part; do
  case $part in
    layers)  # microseconds a layer, dispatched and local
      timeout 100 python3 -P "$here/layer_times.py" 2 "$out/layers.json" ;;
    steps)  # milliseconds of a prompt's only step, peers idle, alike and in a large step, and what of it the device is busy
      [ "$depth" -lt 48 ] || [ -n "${ENGINE:-}" ] || ENGINE=$whole
      timeout 420 python3 -P "$here/step_times.py" "$model" "$out/steps" "${STEP_MODES:-dwdp,$rival}" $lengths "${ENGINE:-{\}}" $depth ;;
    decode)  # milliseconds a step by requests per GPU
      timeout 330 $bench --modes "${DECODE_MODES:-dwdp,$rival,dwdp+dispatch=off}" --decode $batches --hf-overrides "$layers" \
        --engine-args "$engine" --side-by-side --rounds 2 --repeats 2 --max-num-batched-tokens 16384 --out "$out/decode" ;;
    prefill)  # tokens/s per GPU by tokens a step
      timeout 290 $bench --modes "${PREFILL_MODES:-dwdp,$rival,single}" --hf-overrides "$layers" --engine-args "$engine" --side-by-side \
        --max-num-batched-tokens $steps --num-prompts $prompts --ratio ${RATIO:-0.8} --rounds 2 --repeats 2 --out "$out/prefill${RATIO:-}" ;;
    serve)  # real servers, vLLM's defaults
      timeout 560 $serving --modes "${SERVE_MODES:-dwdp,$rival}" --side-by-side --loads "$loads" ${SWEEP:+--sweep $SWEEP} \
        --serve-args "$serve ${SERVE_ARGS:-}" --timeout 320 --out "$out/serve" ;;
    unequal)  # one rank has long prompts, the other chats
      timeout 400 $serving --modes dwdp,$rival --side-by-side --loads "$unequal" \
        --serve-args "$serve" --timeout 240 --out "$out/unequal" ;;
    tests)
      DWDP_RECORD="$out/tests.json" timeout 560 python3 -P -m pytest -q -n 6 --dist worksteal -m gpu "$here" > "$out/tests.log" 2>&1
      ended=$?; tail -15 "$out/tests.log"; (exit $ended) ;;
    before)  # prefill beside other installs of this package, in the folders of $BEFORE
      timeout 200 python3 -P "$here/compare_versions.py" "$model" "$out/before.json" $BEFORE "${PYTHONPATH%%:*}" ;;
    logits)  # log-probabilities in bf16: how far each mode is from one engine
      timeout 420 python3 -P "$here/logits.py" "$out/logits.json" > "$out/logits.log" 2>&1
      ended=$?; grep ": mean \|in the mean\|^near" "$out/logits.log"; [ $ended = 0 ] || tail -15 "$out/logits.log"; (exit $ended) ;;
    soak)  # servers under requests, each killed in another way
      timeout 620 python3 -P "$here/soak.py" --minutes $minutes --lives 3 --logs "$out/soak" > "$out/soak.log" 2>&1
      ended=$?; tail -15 "$out/soak.log"; (exit $ended) ;;
    formats)  # prefill and decode of true shapes by format; the largest only where FORMATS names it: it needs two H200
      formats_failed=0
      python3 -P "$here/true_shapes.py" "$out/shapes" > /dev/null || formats_failed=1
      for name in ${FORMATS:-qwen3-30b-a3b-fp8 qwen3-30b-a3b-int4 gpt-oss-120b deepseek-v2-lite}; do
        turns="--modes dwdp,$rival,tp,single --side-by-side --rounds 2 --repeats 2" overrides=$layers given=$engine bound=280 routing=
        case $name in
          gpt-oss-*)  # dummy weights' router has a bias, which sends all tokens to four experts; one kernel in all modes; four modes fit
            routing=uniform_random overrides='{"num_hidden_layers": 6}' given="${engine%\}}, \"moe_backend\": \"marlin\"}" ;;
          qwen3-235b-*)  # all layers, which no GPU holds, one mode after the other
            turns="--modes dwdp,$rival,tp --rounds 1 --repeats 3" overrides='{}' bound=590 ;;
        esac
        export VLLM_MOE_ROUTING_SIMULATION_STRATEGY=$routing
        shape="python3 -P -m vllm_dwdp.entrypoints.cli bench --model $out/shapes/$name --load-format dummy $turns"
        timeout $bound $shape --hf-overrides "$overrides" --engine-args "$given" --num-prompts $prompts \
          --max-num-batched-tokens ${steps%%,*} --out "$out/$name-prefill" || formats_failed=1
        timeout $bound $shape --hf-overrides "$overrides" --engine-args "$given" --decode $few \
          --max-num-batched-tokens 16384 --out "$out/$name-decode" || formats_failed=1
      done
      unset VLLM_MOE_ROUTING_SIMULATION_STRATEGY
      (exit $formats_failed) ;;
    backends)  # expert parallelism's ways to exchange tokens, at prefill
      known=${BACKENDS:-$(python3 -P -c 'from vllm_dwdp.entrypoints.bench.checks import all2all_backends; print(*all2all_backends())')}
      [ "$known" != allgather_reducescatter ] || { echo "backends: vLLM's own is the only one that can run here"; continue; }
      timeout 400 $bench --modes "dwdp$(printf ',ep+all2all_backend=%s' $known)" \
        --hf-overrides "$layers" --engine-args "$engine" --side-by-side --max-num-batched-tokens ${steps%%,*} --num-prompts $prompts \
        --rounds 2 --repeats 2 --out "$out/backends" ;;
    ceiling)  # large steps by class of kernels, beside a GPU that holds all experts
      timeout 300 python3 -P "$here/step_times.py" "$model" "$out/ceiling" dwdp,single "$steps" "{}" $depth ;;
    residents)  # prefill with a quarter, half, three quarters and all of the remote experts kept; decode too, where nothing dispatches
      residents_failed=0
      share() { python3 -c "print('dwdp+cache_gib=%g' % ($1 * $depth * $remote_gib))"; }
      turn() {
        timeout 280 $bench --modes "$1" --hf-overrides "$layers" --engine-args "$engine" --side-by-side --rounds 2 --repeats 2 \
          "${@:3}" --out "$out/residents-$2" || residents_failed=1
      }
      prefill="--max-num-batched-tokens ${steps%%,*} --num-prompts $prompts"
      turn "dwdp,$(share 0.25),$(share 0.5)" prefill-to-half $prefill
      turn "dwdp,$(share 0.75),$(share 1)" prefill-to-all $prefill
      turn "dwdp+dispatch=off,$(share 0.5)+dispatch=off,$(share 1)+dispatch=off" decode --decode $few --max-num-batched-tokens 16384
      (exit $residents_failed) ;;
    sanitize)
      timeout 560 compute-sanitizer --tool memcheck --target-processes all --report-api-errors no --error-exitcode 3 \
        python3 -P -m pytest -q -m gpu "$here/test_transport.py" "$here/test_tokens.py" -k "views or sums or stream" > "$out/sanitize.log" 2>&1
      ended=$?; tail -5 "$out/sanitize.log"; (exit $ended) ;;
  esac
  ended=$?
  echo "$part: exit $ended"
  [ $ended = 0 ] || failed=1
done
exit $failed
