#!/usr/bin/env bash
# DPO, MODPO, soups, MOD and PARM on SmolLM2 between helpful and harmless: one table, one figure, held-out prompts.
# Pairs are the model's own answers to prompts of HH-RLHF, labelled by the package's two rewards; nothing but the comparison meets
# the test prompts.
# usage:    [HH=FOLDER] pipelines/preferences.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# needs:    helpful-base and harmless-base of HH-RLHF (MIT) as FOLDER/NAME.test.jsonl.gz, by default ../shared/data/hh_rlhf
# takes:    about 2 hours on 2 CPU cores that did other work too: bank 12 minutes, each training 13 to 22, comparison 16
# expect:   README's table: hypervolume 1.90 for the soup, 1.85 MOD, 1.69 MODPO's three points, 1.75 PARM, 1.89 best-of-2, 1.00 the reference
source "$(dirname "$0")/common.sh"
objectives=(helpful harmless)
train=(--cache "$out/logprobs" --dpo.beta 0.5 --dpo.test_share 0.1 --dpo.max_length 256 --dpo.lora.dropout 0)
train+=(--dpo.fit.learning_rate 2e-4 --dpo.fit.warmup 0.1 --dpo.fit.max_steps 36 --dpo.fit.batch_size 8 --dpo.fit.accumulate 2 --dpo.fit.checkpoint_every 12)
if [ -n "$tiny" ]; then
  run tiny --out "$out/tiny"
  objectives=(long readable) model=$out/tiny/model sources=hh:$out/tiny/hh.jsonl draw=() limit=(--limit 4 --steps 2 --reference_samples 4 --best_of '[2]')
  train+=(--dpo.lora.rank 2 --dpo.fit.max_steps 3 --dpo.test_share 0.3) judges='[]'
  parm=(--reward.fit.max_steps 3) sampling=(--sampling.max_new_tokens 8 --sampling.top_k 12 --sampling.batch_size 16)
else
  HH=${HH:-$here/../../shared/data/hh_rlhf}
  model=smollm2 sources=hh:$HH/helpful-base.test.jsonl.gz,hh:$HH/harmless-base.test.jsonl.gz draw=(--max_words 50 --per_source 400)
  limit=(--samples 1) judges='[judge_helpful,judge_harmless]' parm=()
  sampling=(--sampling.max_new_tokens 40 --sampling.top_k 40 --sampling.batch_size 64)
fi
first=${objectives[0]} second=${objectives[1]} rewards="[${objectives[0]},${objectives[1]}]" pairs="[labelled:$out/pairs/pairs.jsonl]"

run prompts --out "$out/prompts" --sources "[$sources]" --single_turn true "${draw[@]}" \
  --shares '{"train": 0.8, "validation": 0.1, "test": 0.1}'
run sample --model "$model" --prompts "$out/prompts/prompts.jsonl" --samples 4 "${sampling[@]}" --out "$out/bank"
run score --run "$out/bank" --model "$model" --rewards "$rewards"
run label --run "$out/bank" --choice extremes --out "$out/pairs"
for name in "${objectives[@]}"; do
  run train dpo --model "$model" --pairs "$pairs" --dpo.objectives "[$name]" "${train[@]}" --out "$out/$name"
done
for weight in 0.25 0.5 0.75; do
  run train modpo --model "$model" --pairs "$pairs" --dpo.objectives "[$second]" --modpo.margins "[$first=dpo:$out/$first/adapter]" \
    --modpo.weights "$weight,$(python3 -c "print(1 - $weight)")" "${train[@]}" --out "$out/modpo-$weight"
done
run train autoregressive --config "$here/../recipes/parm.yaml" --model "$model" --pairs "$pairs" --reward.objectives "$rewards" \
  "${parm[@]}" --out "$out/parm"
both="[$first=$out/$first/adapter,$second=$out/$second/adapter]"
run compare --out "$out/compare" --model "$model" --prompts "$out/prompts/prompts.jsonl" "${sampling[@]}" "${limit[@]}" \
  --rewards "$rewards" --judges "$judges" --methods "{soup: {soup: $both}, MOD: {mixing: $both}, PARM: {guides: ['$out/parm/adapter'], beta: 2.0}, \
MODPO: {policies: ['$out/modpo-0.25/adapter', '$out/modpo-0.5/adapter', '$out/modpo-0.75/adapter']}}"
