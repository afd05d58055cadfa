# Sourced by the pipelines on SmolLM2's own answers to HH-RLHF's prompts: prompts, a bank of four answers to each, its rewards, pairs, a
# DPO policy for each objective, SIPO on these. Sets: objectives, first, second, rewards, model, asked, sampling, judges, pairs, tuned.
# Where `third` is set before, it is an objective too.
if [ -n "$tiny" ]; then
  run tiny --out "$out/tiny"
  objectives=(long readable) model=$out/tiny/model sources=hh:$out/tiny/hh.jsonl draw=() judges='[]'
  sampling=(--sampling.max_new_tokens 8 --sampling.top_k 12 --sampling.batch_size 16)
else
  HH=${HH:-$here/../../shared/data/hh_rlhf}
  objectives=(helpful harmless) model=smollm2 sources=hh:$HH/helpful-base.test.jsonl.gz,hh:$HH/harmless-base.test.jsonl.gz
  draw=(--max_words 50 --per_source 400) judges='[judge_helpful,judge_harmless]'
  sampling=(--sampling.max_new_tokens 40 --sampling.top_k 40 --sampling.batch_size 64)
fi
objectives+=(${third:+"$third"})
first=${objectives[0]} second=${objectives[1]} rewards="[$(IFS=,; echo "${objectives[*]}")]" pairs="[labelled:$out/pairs/pairs.jsonl]"

run prompts --out "$out/prompts" --sources "[$sources]" --single_turn true "${draw[@]}" \
  --shares '{"train": 0.8, "validation": 0.1, "test": 0.1}'
run sample --model "$model" --prompts "$out/prompts/prompts.jsonl" --samples 4 "${sampling[@]}" --out "$out/bank"
run score --run "$out/bank" --model "$model" --rewards "$rewards"
run label --run "$out/bank" --choice extremes --out "$out/pairs"

# DPO for each objective: OUT/OBJECTIVE/adapter, together `tuned`.
dpo=(--cache "$out/logprobs" --dpo.beta 0.5 --dpo.max_length 256 --dpo.lora.dropout 0 --dpo.fit.warmup 0.1 --dpo.fit.batch_size 8)
dpo_first=("${dpo[@]}" --dpo.test_share 0.1 --dpo.fit.learning_rate 2e-4 --dpo.fit.max_steps 36 --dpo.fit.accumulate 2 --dpo.fit.checkpoint_every 12)
[ -z "$tiny" ] || dpo_first+=(--dpo.lora.rank 2 --dpo.fit.max_steps 3 --dpo.test_share 0.3)
# OBJECTIVE=FOLDER of each objective, with the folder's name around it: `each scorer- /model` for OUT/scorer-OBJECTIVE/model.
each() {
  local name named=()
  for name in "${objectives[@]}"; do named+=("'$name=$out/$1$name$2'"); done
  (IFS=,; echo "[${named[*]}]")
}
tuned=$(each '' /adapter)
policies() {
  for name in "${objectives[@]}"; do
    run train dpo --model "$model" --pairs "$pairs" --dpo.objectives "[$name]" "${dpo_first[@]}" --out "$out/$name"
  done
}

asked=(--model "$model" --prompts "$out/prompts/prompts.jsonl")

if [ -n "$tiny" ]; then
  conflicts=5 realign=(--dpo.test_share 0.5 --dpo.fit.learning_rate 1e-3) select=(--margin -9)
  refine=(--reviewing.max_new_tokens 8 --rewriting.max_new_tokens 8)
else
  conflicts=48 realign=(--dpo.test_share 0.1 --dpo.fit.learning_rate 5e-5) select=()
  refine=(--reviewing.max_new_tokens 48 --rewriting.max_new_tokens 40)
fi
# The policies of `policies`, re-aligned on conflicts that they resolve at the weights $1, judged by soups at $2: OUT/sipo/OBJECTIVE/adapter.
sipo() {
  run sipo sample --out "$out/sipo/samples" --model "$model" --pairs "$pairs" --limit "$conflicts" --mixing "$tuned" --weights "$1" \
    "${sampling[@]}" --sampling.greedy true
  run sipo refine --out "$out/sipo/refined" --samples "$out/sipo/samples" --one_shot false --review_weights "$first=1" "${refine[@]}"
  run sipo score --out "$out/sipo/scores" --samples "$out/sipo/samples" --refined "$out/sipo/refined" --policies "$tuned" \
    --soups "$2" --held_out "$held_out"
  run sipo select --out "$out/sipo/selected" --scores "$out/sipo/scores" --unfinished keep --replay 0.5 --replay_pairs "$pairs" "${select[@]}"
  for name in "${objectives[@]}"; do
    run train dpo --model "$out/$name/adapter" --pairs "[labelled:$out/sipo/selected/pairs.jsonl]" --dpo.objectives "[$name]" \
      "${dpo[@]}" --dpo.nll 0.1 --dpo.fit.checkpoint_every 6 "${realign[@]}" --out "$out/sipo/$name"
  done
}
