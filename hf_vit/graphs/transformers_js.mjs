// Load a folder with transformers.js, and print one line of JSON per image: pixel values, outputs and answer.
//
//     node transformers_js.mjs NODE_MODULES FOLDER TASK IMAGE...
import { createRequire } from 'node:module';
import { basename, dirname, resolve } from 'node:path';

const [modules, folder, task, ...images] = process.argv.slice(2);
const { env, pipeline, RawImage } = createRequire(resolve(modules, '_'))('@huggingface/transformers');
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const pipe = await pipeline(task, basename(folder));

for (const image of images) {
    const { pixel_values } = await pipe.processor([await RawImage.read(image)]);
    const outputs = await pipe.model({ pixel_values });
    const answer = await pipe(image);
    console.log(
        JSON.stringify({
            shape: pixel_values.dims,
            pixel_values: Buffer.from(pixel_values.data.buffer).toString('base64'),
            outputs: Array.from((outputs.logits ?? outputs.pooler_output).data),
            labels: task === 'image-feature-extraction' ? [] : answer.map((each) => each.label),
            scores: task === 'image-classification' ? answer.map((each) => each.score) : [],
        }),
    );
}
