#!/usr/bin/env bash
# SIPO on SmolLM2 without a GPU: HH-RLHF's short pairs, labelled by the embedded rewards, whose conflicts the policies resolve themselves.
# usage:    [HH=FOLDER] pipelines/sipo_smollm2.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# needs:    helpful-base and harmless-base of HH-RLHF (MIT) as FOLDER/NAME.test.jsonl.gz, by default ../shared/data/hh_rlhf
# takes:    about 30 minutes on 2 CPU cores by the tokens it runs (320 a second and core forwards, 100 in training); not measured as a whole
# expect:   250 pairs of 250 prompts, 184 of them in conflict (labelling takes 43 CPU seconds); the rest was not run yet:
#           OUT/selected/summary.json: accept rates, gains and lengths by stage, the embedded judges held out; OUT/compare/report.html:
#           MOD of the first policies beside MOD of the re-aligned ones, on prompts of no training pair
# Small on purpose: 250 pairs a policy, 32 conflicts at 3 weights, 64 tokens. Reviews by a model of 135M are what they are: `combine`
# keeps a rewrite only where it is no worse on both implicit rewards, and the summary says how often that was.
source "$(dirname "$0")/common.sh"
weights='["0.75,0.25","0.5,0.5","0.25,0.75"]'
if [ -n "$tiny" ]; then
  run tiny --out "$out/tiny"
  base=$out/tiny/model sources=helpful=hh:$out/tiny/hh.jsonl draw=() shares='{train: 0.7, test: 0.3}' limit=5
  dpo=(--dpo.lora.rank 2 --dpo.test_share 0.5 --dpo.fit.batch_size 4 --dpo.fit.max_steps 3) first=(--dpo.fit.learning_rate 1e-2)
  again=(--dpo.fit.learning_rate 1e-3) drawn=(--sampling.max_new_tokens 8) refine=(--reviewing.max_new_tokens 8 --rewriting.max_new_tokens 8)
  select=(--margin -9) rewards='[helpful=long,harmless=readable]' held_out='[brief]' judges='[]' points=(--limit 4 --steps 2 --n_boot 50 --examples 1)
else
  HH=${HH:-$here/../../shared/data/hh_rlhf}
  base=smollm2 sources=helpful=hh:$HH/helpful-base.test.jsonl.gz,harmless=hh:$HH/harmless-base.test.jsonl.gz shares='{train: 0.8, test: 0.2}'
  draw=(--max_words 60 --size 250) limit=32
  dpo=(--dpo.lora.rank 16 --dpo.max_length 192 --dpo.fit.batch_size 8 --dpo.fit.warmup 0.1 --dpo.fit.checkpoint_every 10
    --dpo.licence 'MIT (HH-RLHF, Anthropic)')
  first=(--dpo.fit.learning_rate 2e-4) again=(--dpo.fit.learning_rate 5e-5)
  drawn=(--sampling.max_new_tokens 64) refine=(--reviewing.max_new_tokens 64 --rewriting.max_new_tokens 64)
  select=() rewards='[helpful,harmless]' held_out='[helpful,harmless,judge_helpful,judge_harmless]'
  judges='[judge_helpful,judge_harmless]' points=(--limit 16 --steps 2)
fi
before="[helpful=$out/helpful/adapter,harmless=$out/harmless/adapter]"
after="[helpful=$out/helpful-again/adapter,harmless=$out/harmless-again/adapter]"

run pairs --out "$out/hh" --sources "[$sources]" --shares "$shares" "${draw[@]}"
run label --out "$out/labelled" --pairs "[labelled:$out/hh/train.jsonl]" --rewards "$rewards" --margin 0.1
for name in helpful harmless; do
  run train dpo --out "$out/$name" --model "$base" --pairs "[labelled:$out/labelled/pairs.jsonl]" --dpo.objectives "[$name]" \
    "${dpo[@]}" "${first[@]}"
done
run sipo sample --out "$out/samples" --model "$base" --pairs "[labelled:$out/labelled/pairs.jsonl]" --limit "$limit" \
  --mixing "$before" --weights "$weights" --sampling.greedy true "${drawn[@]}"
run sipo refine --out "$out/refined" --samples "$out/samples" --one_shot false --review_weights helpful=1 "${refine[@]}"
run sipo score --out "$out/scores" --samples "$out/samples" --refined "$out/refined" --policies "$before" --soups '["0.5,0.5"]' \
  --held_out "$held_out"
run sipo select --out "$out/selected" --scores "$out/scores" --unfinished keep --replay 0.2 \
  --replay_pairs "[labelled:$out/labelled/pairs.jsonl]" "${select[@]}"
for name in helpful harmless; do
  run train dpo --out "$out/$name-again" --model "$out/$name/adapter" --pairs "[labelled:$out/selected/pairs.jsonl]" \
    --dpo.objectives "[$name]" --dpo.nll 0.1 "${dpo[@]}" "${again[@]}"
done
run compare --out "$out/compare" --model "$base" --prompts "$out/hh/prompts.jsonl" --split test "${points[@]}" \
  --methods "{MOD: {mixing: $before}, SIPO: {mixing: $after}}" \
  --rewards "$rewards" --judges "$judges" --samples 1 --reference_samples 4 --best_of '[2,4]' "${drawn[@]}"
