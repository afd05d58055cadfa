#!/usr/bin/env bash
# SIPO on SmolLM2 without a GPU: the model's own answers to HH-RLHF's prompts, labelled by the embedded rewards, whose conflicts its two
# policies resolve themselves.
# usage:    [HH=FOLDER] pipelines/sipo_smollm2.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# needs:    helpful-base and harmless-base of HH-RLHF (MIT) as FOLDER/NAME.test.jsonl.gz, by default ../shared/data/hh_rlhf
#           prompts, bank, pairs and the first two policies are those of pipelines/preferences.sh, taken over where OUT is the same
# takes:    beyond preferences.sh's stages about 40 minutes on a busy core: reviews and rewrites 22, scores 12, re-alignment 2
# expect:   OUT/sipo/selected/summary.json: accept rates, gains and lengths by stage, the embedded judges held out: 6 of 144 candidates
#           accepted, for 3 of 48 conflicts, and no rewrite;
#           OUT/sipo/compare/report.html: MOD of the first policies beside MOD of the re-aligned ones, on prompts of no training pair.
#           On HH's own pairs instead (human-written answers, 32 conflicts) 1 of 96 candidates was accepted: the policies' samples are 0.7 and
#           0.3 sd below both answers in the policies' own view, and the reviews of 135M parameters don't mend that.
source "$(dirname "$0")/common.sh"
weights='["0.75,0.25","0.5,0.5","0.25,0.75"]' objectives=(helpful harmless)
train=(--cache "$out/logprobs" --dpo.beta 0.5 --dpo.max_length 256 --dpo.lora.dropout 0 --dpo.fit.warmup 0.1 --dpo.fit.batch_size 8)
first=(--dpo.test_share 0.1 --dpo.fit.learning_rate 2e-4 --dpo.fit.max_steps 36 --dpo.fit.accumulate 2 --dpo.fit.checkpoint_every 12)
again=(--dpo.nll 0.1 --dpo.fit.checkpoint_every 6)
if [ -n "$tiny" ]; then
  run tiny --out "$out/tiny"
  objectives=(long readable) model=$out/tiny/model sources=hh:$out/tiny/hh.jsonl draw=() limit=5
  first+=(--dpo.lora.rank 2 --dpo.fit.max_steps 3 --dpo.test_share 0.3) again+=(--dpo.test_share 0.5 --dpo.fit.learning_rate 1e-3)
  sampling=(--sampling.max_new_tokens 8 --sampling.top_k 12 --sampling.batch_size 16)
  refine=(--reviewing.max_new_tokens 8 --rewriting.max_new_tokens 8) select=(--margin -9)
  held_out='[brief]' judges='[]' points=(--limit 4 --n_boot 50 --examples 1)
else
  HH=${HH:-$here/../../shared/data/hh_rlhf}
  model=smollm2 sources=hh:$HH/helpful-base.test.jsonl.gz,hh:$HH/harmless-base.test.jsonl.gz draw=(--max_words 50 --per_source 400) limit=48
  again+=(--dpo.test_share 0.1 --dpo.fit.learning_rate 5e-5)
  sampling=(--sampling.max_new_tokens 40 --sampling.top_k 40 --sampling.batch_size 64)
  refine=(--reviewing.max_new_tokens 48 --rewriting.max_new_tokens 40) select=()
  held_out='[helpful,harmless,judge_helpful,judge_harmless]' judges='[judge_helpful,judge_harmless]' points=(--limit 40)
fi
rewards="[${objectives[0]},${objectives[1]}]" pairs="[labelled:$out/pairs/pairs.jsonl]"
before="[${objectives[0]}=$out/${objectives[0]}/adapter,${objectives[1]}=$out/${objectives[1]}/adapter]"
after="[${objectives[0]}=$out/sipo/${objectives[0]}/adapter,${objectives[1]}=$out/sipo/${objectives[1]}/adapter]"

run prompts --out "$out/prompts" --sources "[$sources]" --single_turn true "${draw[@]}" \
  --shares '{"train": 0.8, "validation": 0.1, "test": 0.1}'
run sample --model "$model" --prompts "$out/prompts/prompts.jsonl" --samples 4 "${sampling[@]}" --out "$out/bank"
run score --run "$out/bank" --model "$model" --rewards "$rewards"
run label --run "$out/bank" --choice extremes --out "$out/pairs"
for name in "${objectives[@]}"; do
  run train dpo --model "$model" --pairs "$pairs" --dpo.objectives "[$name]" "${train[@]}" "${first[@]}" --out "$out/$name"
done
run sipo sample --out "$out/sipo/samples" --model "$model" --pairs "$pairs" --limit "$limit" --mixing "$before" --weights "$weights" \
  "${sampling[@]}" --sampling.greedy true
run sipo refine --out "$out/sipo/refined" --samples "$out/sipo/samples" --one_shot false --review_weights "${objectives[0]}=1" "${refine[@]}"
run sipo score --out "$out/sipo/scores" --samples "$out/sipo/samples" --refined "$out/sipo/refined" --policies "$before" \
  --soups '["0.5,0.5"]' --held_out "$held_out"
run sipo select --out "$out/sipo/selected" --scores "$out/sipo/scores" --unfinished keep --replay 0.5 --replay_pairs "$pairs" "${select[@]}"
for name in "${objectives[@]}"; do
  run train dpo --model "$out/$name/adapter" --pairs "[labelled:$out/sipo/selected/pairs.jsonl]" --dpo.objectives "[$name]" \
    "${train[@]}" "${again[@]}" --out "$out/sipo/$name"
done
run compare --out "$out/sipo/compare" --model "$model" --prompts "$out/prompts/prompts.jsonl" --split test "${points[@]}" --steps 2 \
  --methods "{MOD: {mixing: $before}, SIPO: {mixing: $after}}" \
  --rewards "$rewards" --judges "$judges" --samples 1 --reference_samples 4 --best_of '[2,4]' "${sampling[@]}"
